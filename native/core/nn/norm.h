#pragma once

#include <memory>

#include "core/nn/checkpoint.h"
#include "core/nn/module.h"

namespace martlet {

struct Fp8Rows;

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

  // For callers with a backward of their own; nothing is recorded, and the weight gets no gradient.
  // What the backward needs besides x: float32, one a row. Undefined where it is computed anew.
  using Scales = at::Tensor;
  // Into `out` where it is given; its rows, and those of `residual`, may lie further apart than they are long. `codes`,
  // where they are wanted: quantize_fp8_rows() of what is given.
  at::Tensor forward(const at::Tensor& x, Scales& scales, at::Tensor out = {}, Fp8Rows* codes = nullptr) const;
  // sum += x in place; of the sum.
  at::Tensor add_forward(at::Tensor& sum, const at::Tensor& x, Scales& scales, at::Tensor out = {},
                         Fp8Rows* codes = nullptr) const;
  // The gradient of x.
  at::Tensor backward(const at::Tensor& x, const Scales& scales, const at::Tensor& dy) const;
  // residual + the gradient of x. Puts forward(x) in place of dy.
  at::Tensor backward_add(const at::Tensor& x, const Scales& scales, at::Tensor& dy, const at::Tensor& residual,
                          at::Tensor out = {}) const;

  Parameter weight;

 private:
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

// norm(x) for linears to read: not kept where cheap parts are computed again.
inline at::Tensor run_norm(const Norm& norm, const at::Tensor& x) {
  return run_cheap([&norm](const std::vector<at::Tensor>& in) { return norm.forward(in[0]); }, {x});
}

}  // namespace martlet
