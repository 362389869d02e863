#include "core/generate/sampler.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/base/error.h"

namespace martlet {

void fail_not_finite() {
  fail(code::kNonFinite,
       "The model's logits are not finite: it cannot be sampled from. Try dtype float32 or bfloat16.");
}

namespace {

// at::max hands a NaN of any place on, so the highest logit speaks for the row.
void check_finite(double highest) {
  if (!std::isfinite(highest)) fail_not_finite();
}

// logits: [rows, vocab].
std::vector<int64_t> highest_of(const at::Tensor& logits) {
  const auto [highest, ids] = logits.max(1);
  const at::Tensor values = highest.to(at::kCPU, at::kDouble), chosen = ids.to(at::kCPU);
  std::vector<int64_t> out;
  for (int64_t i = 0; i < values.numel(); ++i) {
    check_finite(values.const_data_ptr<double>()[i]);
    out.push_back(chosen.const_data_ptr<int64_t>()[i]);
  }
  return out;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, const std::vector<int64_t>& prompt)
    : options_(options), random_(options.seed), seen_(prompt) {}

int64_t Sampler::next(const at::Tensor& logits) {
  const bool greedy = options_.temperature <= 0;
  const bool penalised = options_.repetition_penalty != 1.0;
  if (is_argmax()) return highest_of(logits.unsqueeze(0))[0];

  const at::Tensor row = logits.to(at::kFloat).to(at::kCPU).clone();
  float* values = row.data_ptr<float>();
  const int64_t vocab = row.numel();
  check_finite(row.max().item<double>());
  if (penalised) {
    std::vector<int64_t> unique = seen_;
    std::sort(unique.begin(), unique.end());
    unique.erase(std::unique(unique.begin(), unique.end()), unique.end());
    const float penalty = static_cast<float>(options_.repetition_penalty);
    for (const int64_t id : unique) {
      if (id >= 0 && id < vocab) values[id] = values[id] < 0 ? values[id] * penalty : values[id] / penalty;
    }
  }
  int64_t chosen;
  if (greedy) {
    chosen = std::max_element(values, values + vocab) - values;
  } else {
    std::vector<int64_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    // Ties go to the lower id, so that a seed means the same everywhere.
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
    int64_t kept = options_.top_k > 0 ? std::min<int64_t>(options_.top_k, vocab) : vocab;
    std::vector<double> weights(kept);
    const double highest = values[order[0]];
    double total = 0;
    for (int64_t i = 0; i < kept; ++i)
      total += weights[i] = std::exp((values[order[i]] - highest) / options_.temperature);
    if (options_.top_p < 1.0) {
      // The smallest set whose probability reaches top_p; the first token always stays.
      double sum = 0;
      int64_t n = 0;
      while (n < kept && sum < options_.top_p * total) sum += weights[n++];
      kept = std::max<int64_t>(1, n);
      total = std::accumulate(weights.begin(), weights.begin() + kept, 0.0);
    }
    double point = std::uniform_real_distribution<double>(0.0, total)(random_);
    int64_t i = 0;
    while (i + 1 < kept && point >= weights[i]) point -= weights[i++];
    chosen = order[i];
  }
  if (penalised) seen_.push_back(chosen);
  return chosen;
}

std::vector<int64_t> next_tokens(const std::vector<Sampler*>& samplers, const at::Tensor& logits) {
  if (std::all_of(samplers.begin(), samplers.end(), [](const Sampler* s) { return s->is_argmax(); }))
    return highest_of(logits);
  std::vector<int64_t> out;
  for (size_t i = 0; i < samplers.size(); ++i)
    out.push_back(samplers[i]->next(logits.select(0, static_cast<int64_t>(i))));
  return out;
}

}  // namespace martlet
