#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace martlet {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kSilu, kRelu };

// Hugging Face's names (`hidden_act`): gelu, gelu_pytorch_tanh, gelu_new, quick_gelu, silu, relu. An unknown one is
// ERR_MARTLET_UNSUPPORTED_MODEL.
Activation parse_activation(const std::string& name);

at::Tensor activate(const at::Tensor& x, Activation activation);

// silu(gate) · up; keeps gate and up only.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace martlet
