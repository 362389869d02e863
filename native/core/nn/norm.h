#pragma once

#include "core/nn/module.h"

namespace martlet {

// Llama's order: normalise in float32, round to the input's dtype, then times the weight (transformers LlamaRMSNorm).
class RmsNorm : public Module {
 public:
  RmsNorm(int64_t dim, double eps);
  at::Tensor forward(const at::Tensor& x) const;
  Parameter weight;

 private:
  int64_t dim_;
  double eps_;
};

class LayerNorm : public Module {
 public:
  LayerNorm(int64_t dim, double eps);
  at::Tensor forward(const at::Tensor& x) const;
  Parameter weight;
  Parameter bias;

 private:
  int64_t dim_;
  double eps_;
};

}  // namespace martlet
