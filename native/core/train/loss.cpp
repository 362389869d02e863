#include "core/train/loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace martlet {
namespace {

// Rows at a time: 32 M float32 logits = 128 MB, so the memory of the loss does not grow with rows × vocabulary.
int64_t rows_per_chunk(int64_t vocab) { return std::max<int64_t>(1, (int64_t{32} << 20) / vocab); }

at::Tensor logits_of(const at::Tensor& hidden, const at::Tensor& weight) {
  return at::mm(hidden, weight.t()).to(at::kFloat);
}

struct ChunkedCrossEntropy : public torch::autograd::Function<ChunkedCrossEntropy> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& hidden,
                                                const at::Tensor& weight, const at::Tensor& targets, double scale,
                                                double smoothing) {
    const bool hidden_grad = hidden.requires_grad(), weight_grad = weight.requires_grad();
    const int64_t n = hidden.size(0), chunk = rows_per_chunk(weight.size(0));
    at::Tensor loss = at::zeros({}, hidden.options().dtype(at::kFloat));
    at::Tensor correct = at::zeros({}, targets.options());
    at::Tensor dhidden = hidden_grad ? at::empty_like(hidden) : at::Tensor();
    at::Tensor dweight = weight_grad ? at::zeros_like(weight) : at::Tensor();
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t rows = std::min(chunk, n - start);
      const at::Tensor h = hidden.narrow(0, start, rows);
      const at::Tensor target = targets.narrow(0, start, rows).unsqueeze(1);
      at::Tensor logits = logits_of(h, weight);
      correct.add_(logits.argmax(1, /*keepdim=*/true).eq(target).sum());
      const at::Tensor log_norm = logits.logsumexp(1, /*keepdim=*/true);
      loss.add_((log_norm - logits.gather(1, target)).sum(), 1 - smoothing);
      if (smoothing > 0) loss.add_((log_norm - logits.mean(1, /*keepdim=*/true)).sum(), smoothing);
      if (!hidden_grad && !weight_grad) continue;
      // d loss / d logits = softmax − (1 − ε) one-hot − ε/V, formed in the logits' own memory.
      logits.sub_(log_norm).exp_();
      logits.scatter_add_(1, target, at::full_like(target, smoothing - 1, logits.options()));
      if (smoothing > 0) logits.sub_(smoothing / static_cast<double>(weight.size(0)));
      const at::Tensor dlogits = logits.mul_(scale).to(hidden.scalar_type());
      if (hidden_grad) {
        at::Tensor out = dhidden.narrow(0, start, rows);
        at::mm_out(out, dlogits, weight);
      }
      if (weight_grad) dweight.addmm_(dlogits.t(), h);
    }
    ctx->save_for_backward({dhidden, dweight});
    ctx->mark_non_differentiable({correct});
    return {loss.mul_(scale), correct};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto scaled = [&](const at::Tensor& grad) {
      return grad.defined() ? grad * grads[0].to(grad.scalar_type()) : grad;
    };
    return {scaled(saved[0]), scaled(saved[1]), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

LossOutput chunked_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                 double scale, double smoothing) {
  const auto outputs = ChunkedCrossEntropy::apply(hidden, weight, targets, scale, smoothing);
  return {outputs[0], outputs[1]};
}

at::Tensor target_logprobs(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
  const int64_t n = hidden.size(0), chunk = rows_per_chunk(weight.size(0));
  at::Tensor out = at::empty({n}, hidden.options().dtype(at::kFloat));
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t rows = std::min(chunk, n - start);
    const at::Tensor logits = logits_of(hidden.narrow(0, start, rows), weight);
    out.narrow(0, start, rows)
        .copy_(logits.gather(1, targets.narrow(0, start, rows).unsqueeze(1)).squeeze(1) - logits.logsumexp(1));
  }
  return out;
}

}  // namespace martlet
