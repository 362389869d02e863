// Linears that read one input as one product, their LoRA pairs as one pair of skinny products, with a backward written
// out: no autograd, frozen weights only.
#pragma once

#include <optional>
#include <vector>

#include "core/nn/linear.h"

namespace martlet {

// Makes the weights of linears of one input views of one tensor, rows one after the other, and their biases too; so the
// stack is one product, and each goes on under its name. Leaves them alone where one is quantised or trained. Needs
// room for one more copy while it runs.
void stack_weights(const std::vector<Linear*>& linears);

class LinearStack {
 public:
  // Nothing where it cannot be done like this: weights that are not stacked, trained, quantised or of another dtype
  // than `dtype`; pairs with magnitudes or dropout (that of `dropout` drops nothing if null), or that are not trained.
  static std::optional<LinearStack> of(const std::vector<const Linear*>& linears, at::ScalarType dtype,
                                       const DropoutSource* dropout);

  // x: [T, in] → [T, Σ out]. `low`: x Aᵀ, [T, Σ r]; the backward needs it.
  at::Tensor forward(const at::Tensor& x, at::Tensor& low) const;
  // Adds the gradients of B to their .grad, puts what those of A need into low's place, and gives that of x.
  at::Tensor backward(const at::Tensor& dy, at::Tensor& low) const;
  // Adds the gradients of A to their .grad. `dlow`: low after backward(). Apart, so that x can be made after it.
  void backward_a(const at::Tensor& dlow, const at::Tensor& x) const;

  bool has_pairs() const { return !pairs_.empty(); }

 private:
  struct Pair {
    const LoraLayer* lora;
    int64_t row, rows;   // of the stacked output
    int64_t rank_begin;  // of the stacked A
    int64_t rank() const { return lora->a.size(0); }
  };
  at::Tensor weight_, bias_;  // [Σ out, in], [Σ out]
  at::Tensor a_;              // [Σ r, in]
  std::vector<Pair> pairs_;
};

}  // namespace martlet
