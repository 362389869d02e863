#include "core/nn/norm.h"

#include <ATen/ATen.h>

namespace martlet {

std::unique_ptr<Norm> make_norm(NormType type, int64_t dim, double eps) {
  if (type == NormType::kRms) return std::make_unique<RmsNorm>(dim, eps);
  return std::make_unique<LayerNorm>(dim, eps);
}

RmsNorm::RmsNorm(int64_t dim, double eps) : dim_(dim), eps_(eps) { register_parameter(weight, "weight", {dim}); }

at::Tensor RmsNorm::forward(const at::Tensor& x) const {
  // Without its weight argument the fused op rounds x̂ to x's dtype, as the original does before it multiplies.
  at::Tensor y = at::rms_norm(x, {dim_}, std::nullopt, eps_) * weight.value;
  observe_output(*this, y);
  return y;
}

LayerNorm::LayerNorm(int64_t dim, double eps) : dim_(dim), eps_(eps) {
  register_parameter(weight, "weight", {dim});
  register_parameter(bias, "bias", {dim});
}

at::Tensor LayerNorm::forward(const at::Tensor& x) const {
  at::Tensor y = at::layer_norm(x, {dim_}, weight.value, bias.value, eps_);
  observe_output(*this, y);
  return y;
}

}  // namespace martlet
