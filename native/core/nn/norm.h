#pragma once

#include <memory>

#include "core/nn/module.h"

namespace martlet {

enum class NormType { kLayer, kRms };

class Norm : public Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x) const = 0;
};

std::unique_ptr<Norm> make_norm(NormType type, int64_t dim, double eps);

// Llama's order: normalise in float32, round to the input's dtype, then times the weight (transformers LlamaRMSNorm).
class RmsNorm : public Norm {
 public:
  RmsNorm(int64_t dim, double eps);
  at::Tensor forward(const at::Tensor& x) const override;
  Parameter weight;

 private:
  int64_t dim_;
  double eps_;
};

class LayerNorm : public Norm {
 public:
  LayerNorm(int64_t dim, double eps);
  at::Tensor forward(const at::Tensor& x) const override;
  Parameter weight;
  Parameter bias;

 private:
  int64_t dim_;
  double eps_;
};

}  // namespace martlet
