// The product of a linear with its weight, in the forms that autograd alone would keep too much for: quantised weights
// (no dense copy is kept for the backward pass) and inputs that can be computed again.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/nn/module.h"

namespace martlet {

// A quantised weight on its way through autograd.
struct QuantizedHolder : torch::CustomClassHolder {
  explicit QuantizedHolder(QuantizedPtr w) : weight(std::move(w)) {}
  QuantizedPtr weight;

  // In backward(): dy W, by the holder in saved_data["quantized"] or else by `dense`.
  static at::Tensor input_gradient(torch::autograd::AutogradContext* ctx, const at::Tensor& dy,
                                   const at::Tensor& dense);
};

// x Wᵀ + bias. `bias` may be undefined.
at::Tensor base_linear(const at::Tensor& x, const Parameter& weight, const at::Tensor& bias);

// What a linear keeps of its input for the backward pass: the tensor, or how it is made again (see nn/checkpoint.h).
struct KeptInput {
  // In forward(): gives what to put into save_for_backward (undefined when the input is made again).
  static at::Tensor keep(torch::autograd::AutogradContext* ctx, const at::Tensor& x);
  // In backward(), with what save_for_backward gave back.
  static at::Tensor restore(torch::autograd::AutogradContext* ctx, const at::Tensor& saved);
};

}  // namespace martlet
