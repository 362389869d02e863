// The low-rank pair of one Linear: y += scaling · dropout(x) Aᵀ Bᵀ (Hu et al. 2021; PEFT's `lora.Linear`).
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace martlet {

struct LoraLayer {
  at::Tensor a;  // [r, in], compute dtype; requires grad while it is trained
  at::Tensor b;  // [out, r]
  double scaling = 1.0;
  double dropout = 0.0;
  // Tells the layers apart when dropout masks are drawn, so that a recomputed layer draws the same mask.
  int64_t index = 0;
};

// Where dropout masks come from during a training forward; absent in evaluation and inference. The mask of a layer
// depends only on (seed of the run, step, micro-batch, layer), so a resumed or recomputed step draws the same one.
struct DropoutSource {
  at::Generator generator;
  uint64_t seed = 0;
  // Bool mask [rows, in], true = kept, for layer `index`.
  at::Tensor mask(const at::Tensor& like, double p, int64_t index);
};

// base(x) + scaling · (dropout(x) Aᵀ) Bᵀ, with a backward that keeps x once and adds in place. `weight` and `bias` may
// be trained as well.
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const LoraLayer& lora,
                       DropoutSource* dropout);

}  // namespace martlet
