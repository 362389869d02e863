// The low-rank pair of one Linear: y += scaling · dropout(x) Aᵀ Bᵀ (Hu et al. 2021; PEFT's `lora.Linear`), with DoRA's
// magnitudes (Liu et al. 2024; PEFT's `use_dora`) where the adapter has them.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/nn/dropout.h"

namespace martlet {

struct Parameter;

struct LoraLayer {
  at::Tensor a;  // [r, in]; requires grad while it is trained. Its dtype is the one the pair is computed in
  at::Tensor b;  // [out, r]
  double scaling = 1.0;
  double dropout = 0.0;
  // Tells the layers apart when dropout masks are drawn, so that a recomputed layer draws the same mask.
  int64_t index = 0;
  // DoRA only: each row of W + scaling · B A is given this length. weight_norm is that row's length before, a constant
  // in the backward pass; refresh_weight_norm() must follow every change of A, B or W.
  at::Tensor magnitude;    // [out]
  at::Tensor weight_norm;  // [out]
};

// Lengths of the rows of W + scaling · B A, in float32: [out].
at::Tensor row_norms(const Parameter& weight, const LoraLayer& lora);
void refresh_weight_norm(const Parameter& weight, LoraLayer& lora);

// base(x) + scaling · (dropout(x) Aᵀ) Bᵀ, with a backward that keeps x once and adds in place. Weight and bias may be
// trained as well; a quantised one's products are its own.
at::Tensor lora_linear(const at::Tensor& x, const Parameter& weight, const at::Tensor& bias, const LoraLayer& lora,
                       DropoutSource* dropout);

}  // namespace martlet
