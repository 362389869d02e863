// The feed-forward part of a transformer layer; the two-layer form is also what projectors are made of.
#pragma once

#include <string>

#include "core/nn/activation.h"
#include "core/nn/linear.h"

namespace martlet {

class FeedForward : public Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x, DropoutSource* dropout) const = 0;
};

// in → hidden, activation, hidden → out. The two linears go by different names in every checkpoint.
class Mlp : public FeedForward {
 public:
  struct Sizes {
    int64_t in = 0, hidden = 0, out = 0;
  };
  Mlp(const Sizes& sizes, Activation activation, bool bias, const std::string& first_name,
      const std::string& second_name);
  at::Tensor forward(const at::Tensor& x, DropoutSource* dropout) const override;
  Linear first, second;

 private:
  Activation activation_;
};

struct GatedMlpNames {
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";
};

// down_proj(silu(gate_proj(x)) · up_proj(x)).
class GatedMlp : public FeedForward {
 public:
  GatedMlp(int64_t hidden_size, int64_t intermediate_size, bool bias, const GatedMlpNames& names = {});
  at::Tensor forward(const at::Tensor& x, DropoutSource* dropout) const override;
  Linear gate_proj, up_proj, down_proj;

 private:
  // The same with `spare` zero columns more between the two products.
  at::Tensor forward_aligned(const at::Tensor& x, int64_t spare) const;
};

}  // namespace martlet
