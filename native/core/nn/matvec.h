// Products with few rows on the CPU, where reading the weights is all the time: kernels that read each weight once, in
// the form that it is kept in, and add up in float32. Many rows are at::linear's (oneDNN), whose products of one row
// read memory at half the speed that it has, and which knows nothing of quantised weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/base/cpu_kernels.h"
#include "core/quant/quantized_tensor.h"

namespace martlet {

// From more rows on, oneDNN's blocks pay.
inline constexpr int64_t kMatvecRows = 8;

// x Wᵀ + bias (may be undefined). x: [1 … kMatvecRows, in] on the CPU, of the weight's dtype (of the one that it was
// quantised from): float32, bfloat16 or float16. → [rows, out], in that dtype. No autograd.
at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Isa isa = best_isa());
at::Tensor matvec(const at::Tensor& x, const QuantizedTensor& weight, const at::Tensor& bias, Isa isa = best_isa());

// The same by matvec() where that takes it and nothing is recorded, else by at::linear.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);
at::Tensor product(const at::Tensor& x, const QuantizedTensor& weight, const at::Tensor& bias);

}  // namespace martlet
