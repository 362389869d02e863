// Cross-entropy over labelled positions without ever holding all logits: the head runs in chunks of rows, and each
// chunk's gradient is formed at once (as Liger's fused linear cross-entropy does), in the memory of its 16-bit logits
// where a kernel does it.
#pragma once

#include <ATen/core/Tensor.h>

namespace martlet {

struct LossOutput {
  at::Tensor loss;     // float32 scalar: scale times the sum over targets; differentiable
  at::Tensor correct;  // int64 scalar: targets that were the most likely token
};

// hidden: [N, H] after the final norm; weight: [V, H]; targets: [N] int64. Logits are rounded to hidden's dtype and
// softmaxed in float32, as transformers does. Each target counts (1 − ε) · −log p(target) + ε · the mean of −log p over
// the vocabulary, ε = `smoothing` (transformers' LabelSmoother).
LossOutput chunked_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                 double scale, double smoothing = 0);

// log p(target) for each row, [N] float32.
at::Tensor target_logprobs(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets);

}  // namespace martlet
