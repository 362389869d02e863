#include "core/nn/linear.h"

#include <ATen/ATen.h>

#include "core/nn/linear_function.h"

namespace martlet {

Linear::Linear(int64_t in_features, int64_t out_features, bool has_bias)
    : in_features_(in_features), out_features_(out_features) {
  register_parameter(weight, "weight", {out_features, in_features});
  if (has_bias) register_parameter(bias, "bias", {out_features});
}

at::Tensor Linear::forward(const at::Tensor& x, DropoutSource* dropout) const {
  at::Tensor y =
      lora != nullptr ? lora_linear(x, weight, bias.value, *lora, dropout) : base_linear(x, weight, bias.value);
  observe_output(*this, y);
  return y;
}

Embedding::Embedding(int64_t rows, int64_t dim) { register_parameter(weight, "weight", {rows, dim}); }

at::Tensor Embedding::forward(const at::Tensor& ids) const {
  at::Tensor y = at::embedding(weight.value, ids);
  observe_output(*this, y);
  return y;
}

}  // namespace martlet
