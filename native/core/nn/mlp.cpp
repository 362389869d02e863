#include "core/nn/mlp.h"

#include <ATen/ATen.h>

namespace martlet {

Mlp::Mlp(const Sizes& sizes, Activation activation, bool bias, const std::string& first_name,
         const std::string& second_name)
    : first(sizes.in, sizes.hidden, bias), second(sizes.hidden, sizes.out, bias), activation_(activation) {
  register_module(first, first_name);
  register_module(second, second_name);
}

at::Tensor Mlp::forward(const at::Tensor& x, DropoutSource* dropout) const {
  return second.forward(activate(first.forward(x, dropout), activation_), dropout);
}

GatedMlp::GatedMlp(int64_t hidden_size, int64_t intermediate_size, bool bias, const GatedMlpNames& names)
    : gate_proj(hidden_size, intermediate_size, bias),
      up_proj(hidden_size, intermediate_size, bias),
      down_proj(intermediate_size, hidden_size, bias) {
  register_module(gate_proj, names.gate);
  register_module(up_proj, names.up);
  register_module(down_proj, names.down);
}

at::Tensor GatedMlp::forward(const at::Tensor& x, DropoutSource* dropout) const {
  return down_proj.forward(swiglu(gate_proj.forward(x, dropout), up_proj.forward(x, dropout)), dropout);
}

}  // namespace martlet
