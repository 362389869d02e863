#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace martlet {

struct Fp8Rows;

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kSilu, kRelu };

// Hugging Face's names (`hidden_act`): gelu, gelu_pytorch_tanh, gelu_new, quick_gelu, silu, relu. An unknown one is
// ERR_MARTLET_UNSUPPORTED_MODEL.
Activation parse_activation(const std::string& name);

at::Tensor activate(const at::Tensor& x, Activation activation);

// silu(gate) · up; keeps gate and up only.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

// For callers with a backward of their own, gate and up side by side: [rows, 2 · n] → [rows, n].
// Into `out` where it is given. Rows of gate_up and of out may lie further apart than they are long. `codes`, where
// they are wanted: quantize_fp8_rows() of what is given.
at::Tensor swiglu_halves(const at::Tensor& gate_up, at::Tensor out = {}, Fp8Rows* codes = nullptr);
// Puts the gradients in place of gate_up, and swiglu_halves(gate_up) in place of dy. `codes`, where they are wanted:
// quantize_fp8_rows() of the gradients, kFp8Gradient with those factors.
void swiglu_halves_backward(at::Tensor& gate_up, at::Tensor& dy, Fp8Rows* codes = nullptr,
                            const at::Tensor& factors = {});

}  // namespace martlet
