#include "core/train/loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/base/cuda_kernels.h"

namespace martlet {
namespace {

// Rows at a time, of float32 logits or of 16-bit ones that a kernel takes: 128 MB, so the memory of the loss does not
// grow with rows × vocabulary.
int64_t rows_per_chunk(const at::Tensor& hidden, int64_t vocab) {
  const int64_t elements = int64_t{cuda_kernels(hidden) != nullptr ? 64 : 32} << 20;
  const int64_t rows = std::max<int64_t>(1, elements / vocab);
  // Whole tiles of the products.
  return rows > 128 ? rows / 128 * 128 : rows;
}

struct RowLosses {
  at::Tensor loss;     // [N] float32
  at::Tensor correct;  // [N] bool: the target has the (first) largest logit
};

// Logits (rounded to their dtype, softmaxed in float32) of rows [start, start + their number) of `out`. With
// `gradient`, gives scale · d loss / d logits, in the logits' dtype and memory where a kernel does it.
at::Tensor row_losses(const at::Tensor& logits, const at::Tensor& targets, double scale, double smoothing,
                      bool gradient, int64_t start, RowLosses& out) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  at::Tensor loss = out.loss.narrow(0, start, rows), correct = out.correct.narrow(0, start, rows);
  if (const cuda::Kernels* kernels = cuda_kernels(logits); kernels != nullptr && targets.is_contiguous()) {
    const cuda::CrossEntropy op = {logits.mutable_data_ptr(), targets.const_data_ptr<int64_t>(), rows,
                                   static_cast<int32_t>(vocab), cuda_type(logits.scalar_type())};
    check_cuda(kernels->cross_entropy(op, static_cast<float>(scale), static_cast<float>(smoothing), gradient,
                                      loss.mutable_data_ptr<float>(), correct.mutable_data_ptr<bool>(),
                                      cuda_stream(logits)));
    return gradient ? logits : at::Tensor();
  }
  const at::Tensor target = targets.unsqueeze(1);
  at::Tensor x = logits.to(at::kFloat);
  correct.copy_(x.argmax(1).eq(targets));
  const at::Tensor log_norm = x.logsumexp(1, /*keepdim=*/true);
  loss.copy_((log_norm - x.gather(1, target)).squeeze(1).mul_(1 - smoothing));
  if (smoothing > 0) loss.add_(log_norm.squeeze(1) - x.mean(1), smoothing);
  if (!gradient) return at::Tensor();
  // softmax − (1 − ε) one-hot − ε/V, formed in the float32 logits' own memory.
  x.sub_(log_norm).exp_();
  x.scatter_add_(1, target, at::full_like(target, smoothing - 1, x.options()));
  if (smoothing > 0) x.sub_(smoothing / static_cast<double>(vocab));
  return x.mul_(scale).to(logits.scalar_type());
}

RowLosses empty_losses(const at::Tensor& hidden) {
  const int64_t n = hidden.size(0);
  return {at::empty({n}, hidden.options().dtype(at::kFloat)), at::empty({n}, hidden.options().dtype(at::kBool))};
}

struct ChunkedCrossEntropy : public torch::autograd::Function<ChunkedCrossEntropy> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& hidden,
                                                const at::Tensor& weight, const at::Tensor& targets, double scale,
                                                double smoothing) {
    const bool hidden_grad = hidden.requires_grad(), weight_grad = weight.requires_grad();
    const int64_t n = hidden.size(0), chunk = rows_per_chunk(hidden, weight.size(0));
    RowLosses losses = empty_losses(hidden);
    at::Tensor dhidden = hidden_grad ? at::empty_like(hidden) : at::Tensor();
    at::Tensor dweight = weight_grad ? at::zeros_like(weight) : at::Tensor();
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t rows = std::min(chunk, n - start);
      const at::Tensor h = hidden.narrow(0, start, rows);
      const at::Tensor dlogits = row_losses(at::mm(h, weight.t()), targets.narrow(0, start, rows), scale, smoothing,
                                            hidden_grad || weight_grad, start, losses);
      if (hidden_grad) {
        at::Tensor out = dhidden.narrow(0, start, rows);
        at::mm_out(out, dlogits, weight);
      }
      if (weight_grad) dweight.addmm_(dlogits.t(), h);
    }
    const at::Tensor correct = losses.correct.sum();
    ctx->save_for_backward({dhidden, dweight});
    ctx->mark_non_differentiable({correct});
    return {losses.loss.sum().mul_(scale), correct};
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
  const int64_t n = hidden.size(0), chunk = rows_per_chunk(hidden, weight.size(0));
  RowLosses out = empty_losses(hidden);
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t rows = std::min(chunk, n - start);
    row_losses(at::mm(hidden.narrow(0, start, rows), weight.t()), targets.narrow(0, start, rows), /*scale=*/1,
               /*smoothing=*/0, /*gradient=*/false, start, out);
  }
  return out.loss.neg_();
}

}  // namespace martlet
