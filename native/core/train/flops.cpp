#include "core/train/flops.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <set>

#include "core/base/memory.h"
#include "core/nn/linear.h"

namespace martlet {

FlopCounter::FlopCounter(VisionLanguageModel& model, bool full, int64_t adapter) {
  std::set<const Module*> encoder;
  if (const Module* root = model.language_model().encoder()) {
    root->visit([&](const std::string&, const Module& module) { encoder.insert(&module); });
  }
  double linears = 0, encoder_linears = 0;
  model.visit([&](const std::string& path, Module& module) {
    const auto* linear = dynamic_cast<const Linear*>(&module);
    if (linear != nullptr && !model.info().is_head(path) && model.part_of(path) == Part::kLanguage)
      (encoder.count(linear) ? encoder_linears : linears) +=
          static_cast<double>(linear->in_features() * linear->out_features());
  });
  const TextConfig& d = model.language_model().config();
  const double head = static_cast<double>(d.vocab_size * d.hidden_size);
  // Two for a multiply-add; forward, the gradient of the input, and that of the weight where it is trained.
  const double passes = 2 * (full ? 3 : 2);
  per_token_ = passes * linears + 6 * static_cast<double>(adapter);
  per_encoder_token_ = passes * encoder_linears;
  per_labelled_ = passes * head;
  // Scores and mixing: forward, and twice that backward. Half of the square where it is causal.
  const auto width = static_cast<double>(d.num_heads * d.head_dim);
  per_pair_ = 3 * 2 * width * static_cast<double>(d.num_layers);
  per_encoder_pair_ = 3 * 4 * width * static_cast<double>(d.encoder_layers);
}

double FlopCounter::training(const PackedBatch& batch) const {
  const auto pairs = [](const SequenceLengths& rows) {
    double sum = 0;
    for (size_t i = 1; i < rows.offsets.size(); ++i) {
      const auto length = static_cast<double>(rows.offsets[i] - rows.offsets[i - 1]);
      sum += length * length;
    }
    return sum;
  };
  const bool apart = batch.decoder_ids.defined();
  const SequenceLengths& rows = apart ? batch.decoder_rows : batch.rows;
  double flops = per_token_ * static_cast<double>(rows.total()) + per_labelled_ * static_cast<double>(batch.labelled) +
                 per_pair_ * pairs(rows);
  if (apart) flops += per_encoder_token_ * static_cast<double>(batch.tokens) + per_encoder_pair_ * pairs(batch.rows);
  return flops;
}

double measured_peak_flops(c10::Device device) {
  if (device.is_cpu()) return 0;
  const at::NoGradGuard no_grad;
  constexpr int64_t kSize = 8192;
  constexpr int kRuns = 5;
  const auto options = at::TensorOptions().dtype(at::kBFloat16).device(device);
  // Random numbers: products of zeros run faster than any real ones.
  const at::Tensor a = at::randn({kSize, kSize}, options), b = at::randn({kSize, kSize}, options);
  at::Tensor out = at::mm(a, b);
  synchronize(device);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRuns; ++i) at::mm_out(out, a, b);
  synchronize(device);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 2.0 * kRuns * kSize * kSize * kSize / seconds.count();
}

}  // namespace martlet
