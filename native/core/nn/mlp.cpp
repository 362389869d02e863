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

namespace {

// Tensor cores want rows of a multiple of 8 numbers; those of Qwen2.5-VL's tower have 3,420.
constexpr int64_t kAlignment = 8;
// From so many rows on, products on unaligned rows cost more than a copy of the weights.
constexpr int64_t kRowsWorthPadding = 256;

bool is_plain(const Linear& linear) {
  return linear.weight.value.defined() && linear.lora == nullptr && !linear.weight.value.requires_grad();
}

at::Tensor padded(const at::Tensor& x, at::IntArrayRef amounts) {
  return x.defined() ? at::constant_pad_nd(x, amounts) : x;
}

at::Tensor padded_linear(const Linear& linear, const at::Tensor& x, at::IntArrayRef amounts, int64_t bias_amount) {
  const at::Tensor bias = padded(linear.bias.value, {0, bias_amount});
  return at::linear(x, padded(linear.weight.value, amounts), bias.defined() ? std::optional(bias) : std::nullopt);
}

}  // namespace

at::Tensor GatedMlp::forward_aligned(const at::Tensor& x, int64_t spare) const {
  const int64_t hidden = gate_proj.out_features();
  const at::Tensor gate = padded_linear(gate_proj, x, {0, 0, 0, spare}, spare),
                   up = padded_linear(up_proj, x, {0, 0, 0, spare}, spare);
  observe_output(gate_proj, gate.narrow(1, 0, hidden));
  observe_output(up_proj, up.narrow(1, 0, hidden));
  at::Tensor y = padded_linear(down_proj, swiglu(gate, up), {0, spare}, 0);
  observe_output(down_proj, y);
  return y;
}

at::Tensor GatedMlp::forward(const at::Tensor& x, DropoutSource* dropout) const {
  const int64_t spare = (kAlignment - gate_proj.out_features() % kAlignment) % kAlignment;
  const bool recorded = at::GradMode::is_enabled() && x.requires_grad();
  if (spare > 0 && x.is_cuda() && x.scalar_type() != at::kFloat && x.size(0) >= kRowsWorthPadding && !recorded &&
      is_plain(gate_proj) && is_plain(up_proj) && is_plain(down_proj)) {
    return forward_aligned(x, spare);
  }
  const at::Tensor product = run_cheap([](const std::vector<at::Tensor>& in) { return swiglu(in[0], in[1]); },
                                       {gate_proj.forward(x, dropout), up_proj.forward(x, dropout)});
  return down_proj.forward(product, dropout);
}

}  // namespace martlet
