// Linears that read one input as one product, their LoRA pairs as one pair of skinny products, with a backward written
// out: no autograd, frozen weights only.
#pragma once

#include <optional>
#include <vector>

#include "core/nn/linear.h"
#include "core/quant/fp8.h"

namespace martlet {

// How the products of the pairs reach the outputs of the frozen weights.
enum class PairForm {
  kInPlace,  // added to them: y = x Wᵀ, then y += s (x Aᵀ) Bᵀ; dx = dy W, then dx += (s dy B) A
  // As columns more of one product: y = [x, x Aᵀ] [W, s B]ᵀ and dx = [dy, s dy B] [W; A]. W, s B and A lie in one
  // buffer; x and dy are best written by their makers where there is room beside them (empty_input(), empty_output()).
  kAugmented,
};
// What is taken on a device: MARTLET_LORA_FORM (in-place or augmented, to measure the two) where it is set.
PairForm pair_form(at::Device device);

// Makes the weights of linears of one input views of one tensor, rows one after the other, and their biases too; so the
// stack is one product, and each goes on under its name. kAugmented: with room for the pairs that are switched on, a
// few columns and rows more, where these fit that form. Without pairs rows lie without gaps again. Codes of fp8 and
// their scales too, always without gaps: kAugmented has the pairs' room after the codes. Of weights of 4 and 8 bits the
// biases alone. Leaves the weights alone where only some are quantised, or one is trained. Needs room for one more copy
// while it runs.
void stack_weights(const std::vector<Linear*>& linears, PairForm form);

class LinearStack {
 public:
  // Nothing where it cannot be done like this: weights that are not stacked, trained, only some of them quantised, or
  // of another dtype than `dtype`; pairs with magnitudes or dropout (that of `dropout` drops nothing if null), or that
  // are not trained. Weights of 4 and 8 bits are dequantised for each product, next to each other, in `form` (absent:
  // that of their device).
  static std::optional<LinearStack> of(const std::vector<const Linear*>& linears, at::ScalarType dtype,
                                       const DropoutSource* dropout, std::optional<PairForm> form = {});

  // Where the input and the output (whose gradient will take its place) are best written: [rows, in], [rows, Σ out].
  // Either may also be any other tensor; undefined where no place is better than another.
  at::Tensor empty_input(int64_t rows) const;
  at::Tensor empty_output(int64_t rows) const;

  // Makers of x and dy write their codes too where the weights are of fp8: else these are read once more for them.
  bool is_fp8() const { return fp8_ != nullptr; }
  const at::Tensor& gradient_factors() const { return fp8_->rows().scales; }  // for quantize_fp8_rows() of dy

  // x: [T, in] → [T, Σ out], into y where it is given (which empty_output() has made). `low`: x Aᵀ, [T, Σ r or more];
  // the backward needs it. `codes`: of x, if they have been made.
  at::Tensor forward(const at::Tensor& x, at::Tensor& low, at::Tensor y = {}, const Fp8Rows& codes = {}) const;
  // Adds the gradients of B to their .grad, puts what those of A need into low's place, and gives that of x. `codes`:
  // of dy, if they have been made.
  at::Tensor backward(const at::Tensor& dy, at::Tensor& low, const Fp8Rows& codes = {}) const;
  // Adds the gradients of A to their .grad. `dlow`: low after backward(). Apart, so that x can be made after it.
  void backward_a(const at::Tensor& dlow, const at::Tensor& x) const;

  // Copies the pairs to where they lie beside the weights, or after their codes. After each change of theirs; nothing
  // to do where stack_weights() made no room.
  void refresh_pairs() const;

  bool has_pairs() const { return !pairs_.empty(); }
  PairForm form() const { return columns_ > 0 ? PairForm::kAugmented : PairForm::kInPlace; }

 private:
  struct Pair {
    const LoraLayer* lora;
    int64_t row, rows;   // of the stacked output
    int64_t rank_begin;  // of the stacked A
    int64_t rank() const { return lora->a.size(0); }
  };
  at::Tensor input_gradient(const at::Tensor& dy, const Fp8Rows& codes) const;  // of the weights alone
  bool backward_b(const at::Tensor& dy, const at::Tensor& low, bool tailed) const;
  // The parts of `buffer`, which holds the weights.
  void bind(const at::Tensor& buffer);
  LinearStack dequantized() const;  // of quantized_

  int64_t in_ = 0, out_ = 0;  // Σ out
  at::TensorOptions options_;
  at::Tensor weight_, bias_;              // [Σ out, in], [Σ out]
  std::shared_ptr<const Fp8Tensor> fp8_;  // in weight_'s place; always with kInPlace
  std::vector<QuantizedPtr> quantized_;   // of 4 or 8 bits, in weight_'s place
  at::Tensor a_;                          // [Σ r, in]; beside weights or codes: [ranks_, in], the last rows zeros
  std::vector<Pair> pairs_;
  // kAugmented: [Σ out + ranks_, in + columns_]; columns in.. are s B (each pair's rows only) and the bias, rows out..
  // are A. Undefined while the weights are quantised.
  at::Tensor buffer_;
  at::Tensor scaled_b_;  // of it, or after the codes of fp8: [Σ out, ranks_]
  int64_t ranks_ = 0, columns_ = 0;
};

}  // namespace martlet
