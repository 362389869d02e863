#include "core/nn/activation.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/base/cuda_kernels.h"
#include "core/base/error.h"
#include "core/quant/fp8.h"

namespace martlet {

Activation parse_activation(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "relu") return Activation::kRelu;
  fail(code::kUnsupportedModel, "config.json asks for the activation \"" + name +
                                    "\"; known are gelu, gelu_pytorch_tanh, gelu_new, quick_gelu, silu and relu.");
}

namespace {

at::Tensor quick_gelu(const at::Tensor& x) {
  const bool recorded = at::GradMode::is_enabled() && x.requires_grad();
  const cuda::Kernels* kernels = recorded || !x.is_contiguous() ? nullptr : cuda_kernels(x);
  if (kernels == nullptr) return x * at::sigmoid(x * 1.702);
  at::Tensor out = at::empty_like(x);
  check_cuda(kernels->quick_gelu(x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), cuda_type(x.scalar_type()),
                                 cuda_stream(x)));
  return out;
}

}  // namespace

at::Tensor activate(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return at::gelu(x);
    case Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case Activation::kQuickGelu:
      return quick_gelu(x);
    case Activation::kSilu:
      return at::silu(x);
    case Activation::kRelu:
      return at::relu(x);
  }
  fail(code::kInternal, "unreachable activation");
}

namespace {

// Null unless one kernel does it: the tensors lie alike and without gaps.
const cuda::Kernels* swiglu_kernels(const at::Tensor& gate, const at::Tensor& up) {
  return gate.is_contiguous() && up.is_contiguous() ? cuda_kernels(gate) : nullptr;
}

at::Tensor swiglu_forward(const at::Tensor& gate, const at::Tensor& up) {
  const cuda::Kernels* kernels = swiglu_kernels(gate, up);
  if (kernels == nullptr) return at::silu(gate).mul_(up);
  at::Tensor out = at::empty_like(gate);
  check_cuda(kernels->swiglu(gate.const_data_ptr(), up.const_data_ptr(), out.mutable_data_ptr(), gate.numel(),
                             cuda_type(gate.scalar_type()), cuda_stream(gate)));
  return out;
}

struct SwigluFunction : public torch::autograd::Function<SwigluFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up) {
    ctx->save_for_backward({gate, up});
    return swiglu_forward(gate, up);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1], dy = grads[0].contiguous();
    if (const cuda::Kernels* kernels = swiglu_kernels(gate, up)) {
      at::Tensor dgate = at::empty_like(gate), dup = at::empty_like(up);
      check_cuda(kernels->swiglu_backward(gate.const_data_ptr(), up.const_data_ptr(), dy.const_data_ptr(),
                                          dgate.mutable_data_ptr(), dup.mutable_data_ptr(), gate.numel(),
                                          cuda_type(gate.scalar_type()), cuda_stream(gate)));
      return {dgate, dup};
    }
    return {at::silu_backward(dy * up, gate), at::silu(gate).mul_(dy)};
  }
};

}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  const bool recorded = at::GradMode::is_enabled() && (gate.requires_grad() || up.requires_grad());
  return recorded ? SwigluFunction::apply(gate, up) : swiglu_forward(gate, up);
}

at::Tensor swiglu_halves(const at::Tensor& gate_up, at::Tensor out, Fp8Rows* codes) {
  const int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  const cuda::Kernels* kernels = gate_up.stride(1) == 1 ? cuda_kernels(gate_up) : nullptr;
  if (kernels == nullptr) {
    const at::Tensor product = at::silu(gate_up.narrow(1, 0, n)).mul_(gate_up.narrow(1, n, n));
    if (codes != nullptr) *codes = quantize_fp8_rows(product, at::kFloat8_e4m3fn);
    return out.defined() ? out.copy_(product) : product;
  }
  if (codes != nullptr) *codes = empty_fp8_rows(rows, n, gate_up.device());
  if (!out.defined()) out = at::empty({rows, n}, gate_up.options());
  check_cuda(kernels->swiglu_halves(gate_up.const_data_ptr(), gate_up.stride(0), out.mutable_data_ptr(), out.stride(0),
                                    rows, static_cast<int32_t>(n), cuda_type(gate_up.scalar_type()),
                                    codes != nullptr ? describe(*codes) : cuda::Fp8Codes(), cuda_stream(gate_up)));
  return out;
}

void swiglu_halves_backward(at::Tensor& gate_up, at::Tensor& dy, Fp8Rows* codes, const at::Tensor& factors) {
  const int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  const cuda::Kernels* kernels = gate_up.stride(1) == 1 && dy.stride(1) == 1 ? cuda_kernels(gate_up) : nullptr;
  if (kernels != nullptr) {
    if (codes != nullptr) *codes = empty_fp8_rows(rows, 2 * n, gate_up.device());
    check_cuda(kernels->swiglu_halves_backward(
        gate_up.mutable_data_ptr(), gate_up.stride(0), dy.mutable_data_ptr(), dy.stride(0), rows,
        static_cast<int32_t>(n), cuda_type(gate_up.scalar_type()),
        codes != nullptr ? describe(*codes, factors) : cuda::Fp8Codes(), cuda_stream(gate_up)));
    return;
  }
  at::Tensor gate = gate_up.narrow(1, 0, n), up = gate_up.narrow(1, n, n);
  const at::Tensor active = at::silu(gate), dgate = at::silu_backward(dy * up, gate), dup = active * dy;
  at::mul_out(dy, active, up);
  gate.copy_(dgate);
  up.copy_(dup);
  if (codes != nullptr) *codes = quantize_fp8_rows(gate_up, kFp8Gradient, factors);
}

}  // namespace martlet
