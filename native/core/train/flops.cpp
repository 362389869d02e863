#include "core/train/flops.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>

#include "core/base/memory.h"
#include "core/nn/linear.h"

namespace martlet {

FlopCounter::FlopCounter(VisionLanguageModel& model, bool full, int64_t adapter) {
  double linears = 0;
  model.visit([&](const std::string& path, Module& module) {
    const auto* linear = dynamic_cast<const Linear*>(&module);
    if (linear != nullptr && !model.info().is_head(path) && model.part_of(path) == Part::kLanguage)
      linears += static_cast<double>(linear->in_features() * linear->out_features());
  });
  const DecoderConfig& d = model.decoder().config();
  const double head = static_cast<double>(d.vocab_size * d.hidden_size);
  // Two for a multiply-add; forward, the gradient of the input, and that of the weight where it is trained.
  per_token_ = 2 * linears * (full ? 3 : 2) + 6 * static_cast<double>(adapter);
  per_labelled_ = 2 * head * (full ? 3 : 2);
  // Scores and mixing, half of the square: forward, and twice that backward.
  per_pair_ = 3 * 2 * static_cast<double>(d.num_heads * d.head_dim * d.num_layers);
}

double FlopCounter::training(const PackedBatch& batch) const {
  double pairs = 0;
  for (size_t i = 1; i < batch.rows.offsets.size(); ++i) {
    const auto length = static_cast<double>(batch.rows.offsets[i] - batch.rows.offsets[i - 1]);
    pairs += length * length;
  }
  return per_token_ * static_cast<double>(batch.tokens) + per_labelled_ * static_cast<double>(batch.labelled) +
         per_pair_ * pairs;
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
