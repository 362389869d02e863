#include "core/nn/mlp.h"

#include <ATen/ATen.h>

#include "core/nn/checkpoint.h"

namespace martlet {

Mlp::Mlp(const Sizes& sizes, Activation activation, bool bias, const std::string& first_name,
         const std::string& second_name)
    : first(sizes.in, sizes.hidden, bias), second(sizes.hidden, sizes.out, bias), activation_(activation) {
  register_module(first, first_name);
  register_module(second, second_name);
}

at::Tensor Mlp::forward(const at::Tensor& x, DropoutSource* dropout) const {
  const at::Tensor product =
      run_cheap([act = activation_](const std::vector<at::Tensor>& in) { return activate(in[0], act); },
                {first.forward(x, dropout)});
  return second.forward(product, dropout);
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
  const at::Tensor product = run_cheap([](const std::vector<at::Tensor>& in) { return swiglu(in[0], in[1]); },
                                       {gate_proj.forward(x, dropout), up_proj.forward(x, dropout)});
  return down_proj.forward(product, dropout);
}

}  // namespace martlet
