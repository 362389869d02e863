#include "core/nn/dropout.h"

#include <ATen/ATen.h>

#include "core/base/rng.h"

namespace martlet {
namespace {

// Set apart from the indices of LoRA layers.
constexpr int64_t kModelStream = int64_t{1} << 41;

}  // namespace

at::Tensor DropoutSource::mask(const at::Tensor& like, double p, int64_t index) const {
  at::Generator own = generator;
  {
    std::lock_guard<std::mutex> lock(own.mutex());
    own.set_current_seed(mix_seed(seed, static_cast<uint64_t>(index)));
  }
  return at::empty_like(like, like.options().dtype(at::kBool)).bernoulli_(1.0 - p, own);
}

double ModelDropout::active_rate(const DropoutSource* source) const {
  if (source == nullptr || rate <= 0) return 0;
  return source->model_rate.value_or(rate);
}

at::Tensor ModelDropout::forward(const at::Tensor& x, const DropoutSource* source, int64_t part) const {
  const double p = active_rate(source);
  if (p <= 0) return x;
  const int64_t index = kModelStream + (part << 32) + (stack << 24) + (layer << 8) + place;
  // x · mask / (1 − p) in one kernel that keeps the mask's bytes alone.
  return at::native_dropout_backward(x, source->mask(x, p, index), 1.0 / (1.0 - p));
}

}  // namespace martlet
