#include "core/lora/linear_stack.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace martlet {
namespace {

// The tensors as one, if their rows lie one after the other in one memory; else undefined.
at::Tensor joined(const std::vector<at::Tensor>& parts) {
  int64_t rows = 0, place = parts[0].storage_offset();
  for (const at::Tensor& part : parts) {
    if (!part.is_contiguous() || !part.storage().is_alias_of(parts[0].storage()) || part.storage_offset() != place)
      return at::Tensor();
    rows += part.size(0);
    place += part.numel();
  }
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  sizes[0] = rows;
  return parts[0].detach().as_strided(sizes, parts[0].strides());
}

}  // namespace

void stack_weights(const std::vector<Linear*>& linears) {
  if (linears.size() < 2) return;
  const at::NoGradGuard no_grad;
  for (Parameter Linear::* const member : {&Linear::weight, &Linear::bias}) {
    std::vector<at::Tensor> parts;
    for (const Linear* linear : linears) {
      const Parameter& parameter = linear->*member;
      if (!parameter.value.defined() || parameter.value.requires_grad() || parameter.replaced) return;
      if (!parts.empty() && (parameter.value.options().device() != parts[0].device() ||
                             parameter.value.scalar_type() != parts[0].scalar_type()))
        return;
      parts.push_back(parameter.value);
    }
    if (joined(parts).defined()) continue;
    const at::Tensor all = at::cat(parts);
    int64_t row = 0;
    for (Linear* linear : linears) {
      at::Tensor& value = (linear->*member).value;
      const int64_t rows = value.size(0);
      value = all.narrow(0, row, rows);
      row += rows;
    }
  }
}

std::optional<LinearStack> LinearStack::of(const std::vector<const Linear*>& linears, at::ScalarType dtype,
                                           const DropoutSource* dropout) {
  LinearStack stack;
  std::vector<at::Tensor> weights, biases, a;
  int64_t row = 0, rank = 0;
  for (const Linear* linear : linears) {
    const at::Tensor &weight = linear->weight.value, &bias = linear->bias.value;
    if (!weight.defined() || weight.scalar_type() != dtype || weight.requires_grad()) return std::nullopt;
    weights.push_back(weight);
    if (bias.defined()) {
      if (bias.scalar_type() != dtype || bias.requires_grad()) return std::nullopt;
      biases.push_back(bias);
    }
    if (const LoraLayer* lora = linear->lora) {
      if (lora->magnitude.defined() || (dropout != nullptr && lora->dropout > 0) || !lora->a.requires_grad() ||
          !lora->b.requires_grad() || lora->b.scalar_type() != lora->a.scalar_type() ||
          (!a.empty() && a[0].scalar_type() != lora->a.scalar_type()))
        return std::nullopt;
      stack.pairs_.push_back({lora, row, weight.size(0), rank});
      rank += lora->a.size(0);
      a.push_back(lora->a.detach());
    }
    row += weight.size(0);
  }
  if (!biases.empty() && biases.size() != linears.size()) return std::nullopt;
  stack.weight_ = joined(weights);
  if (!biases.empty()) stack.bias_ = joined(biases);
  if (!stack.weight_.defined() || (!biases.empty() && !stack.bias_.defined())) return std::nullopt;
  if (!a.empty()) stack.a_ = a.size() == 1 ? a[0] : at::cat(a);
  return stack;
}

at::Tensor LinearStack::forward(const at::Tensor& x, at::Tensor& low) const {
  at::Tensor y = at::linear(x, weight_, bias_.defined() ? std::optional(bias_) : std::nullopt);
  if (pairs_.empty()) return y;
  low = at::mm(x.to(a_.scalar_type()), a_.t());
  for (const Pair& pair : pairs_) {
    at::Tensor part = y.narrow(1, pair.row, pair.rows);
    const at::Tensor h = low.narrow(1, pair.rank_begin, pair.rank()), b = pair.lora->b.detach();
    if (b.scalar_type() == y.scalar_type()) {
      part.addmm_(h, b.t(), 1, pair.lora->scaling);
    } else {
      part.add_(at::mm(h, b.t()), pair.lora->scaling);
    }
  }
  return y;
}

at::Tensor LinearStack::backward(const at::Tensor& dy, at::Tensor& low) const {
  at::Tensor dx = at::mm(dy, weight_);
  if (pairs_.empty()) return dx;
  const at::Tensor dlow = at::empty_like(low);
  for (const Pair& pair : pairs_) {
    const at::Tensor dy_low = dy.narrow(1, pair.row, pair.rows).to(low.scalar_type());
    const at::Tensor b = pair.lora->b.detach();
    at::Tensor dh = dlow.narrow(1, pair.rank_begin, pair.rank());
    at::addmm_out(dh, dh, dy_low, b, /*beta=*/0, /*alpha=*/pair.lora->scaling);
    const at::Tensor h = low.narrow(1, pair.rank_begin, pair.rank());
    if (at::Tensor& grad = pair.lora->b.mutable_grad(); grad.defined()) {
      grad.addmm_(dy_low.t(), h, 1, pair.lora->scaling);
    } else {
      grad = at::mm(dy_low.t(), h).mul_(pair.lora->scaling);
    }
  }
  if (a_.scalar_type() == dx.scalar_type()) {
    dx.addmm_(dlow, a_);
  } else {
    dx.add_(at::mm(dlow, a_));
  }
  low = dlow;
  return dx;
}

void LinearStack::backward_a(const at::Tensor& dlow, const at::Tensor& x) const {
  if (pairs_.empty()) return;
  const at::Tensor x_low = x.to(dlow.scalar_type());
  const at::Tensor da = at::mm(dlow.t(), x_low);  // [Σ r, in]
  std::vector<at::Tensor> grads, added;
  for (const Pair& pair : pairs_) {
    const at::Tensor part = da.narrow(0, pair.rank_begin, pair.rank());
    at::Tensor& grad = pair.lora->a.mutable_grad();
    if (grad.defined()) {
      grads.push_back(grad);
      added.push_back(part);
    } else {
      grad = part.clone();
    }
  }
  if (!grads.empty()) at::_foreach_add_(grads, added);
}

}  // namespace martlet
