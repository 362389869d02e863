#include "core/language/frozen_layer.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/base/cuda_kernels.h"
#include "core/lora/linear_stack.h"

namespace martlet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// to = from. ATen copies rows that lie apart with half the memory's speed.
void put(const at::Tensor& to, const at::Tensor& from) {
  const int64_t row = from.size(1) * from.size(2);
  const cuda::Kernels* kernels = cuda_kernels(from);
  if (kernels == nullptr || !from.is_contiguous() || to.stride(2) != 1 || to.stride(1) != to.size(2)) {
    to.copy_(from);
    return;
  }
  const int64_t bytes = static_cast<int64_t>(from.element_size());
  check_cuda(kernels->copy_rows(from.const_data_ptr(), row * bytes, to.mutable_data_ptr(), to.stride(0) * bytes,
                                row * bytes, from.size(0), cuda_stream(from)));
}

bool trains(const Norm& norm) { return static_cast<const RmsNorm&>(norm).weight.value.requires_grad(); }

class FrozenLayer : public torch::CustomClassHolder {
 public:
  static c10::intrusive_ptr<FrozenLayer> of(const DecoderLayer& layer, const DecoderConfig& config, const at::Tensor& x,
                                            const DecoderPass& pass);
  FrozenLayer(LinearStack qkv, LinearStack o, LinearStack gate_up, LinearStack down)
      : qkv_(std::move(qkv)), o_(std::move(o)), gate_up_(std::move(gate_up)), down_(std::move(down)) {}

  at::Tensor forward(const at::Tensor& x);
  // The gradient of x, undefined unless it is wanted. Once.
  at::Tensor backward(const at::Tensor& dy, bool input_grad);
  void check_cancelled() const {
    if (job_ != nullptr) job_->check();
  }

 private:
  // Everything up to the second norm, which it gives; the norm's codes where gate|up is of fp8.
  at::Tensor attend(Fp8Rows& codes);
  // d(q|k|v) in place of q|k|v.
  void attention_backward(const at::Tensor& dmixed);
  at::Tensor heads(const at::Tensor& rows, int64_t begin, int64_t count) const {
    return rows.narrow(1, begin * head_dim_, count * head_dim_).unflatten(1, {count, head_dim_});
  }

  LinearStack qkv_, o_, gate_up_, down_;
  const RmsNorm *input_norm_ = nullptr, *post_attention_norm_ = nullptr, *q_norm_ = nullptr, *k_norm_ = nullptr;
  int64_t num_heads_ = 0, num_kv_heads_ = 0, head_dim_ = 0;
  RotaryTable rotary_;
  const SequenceLengths* rows_ = nullptr;  // outlives the backward pass, as the job does
  const JobContext* job_ = nullptr;
  Recompute recompute_ = Recompute::kNone;

  // Kept for the backward. low: the inner products of the pairs, [T, Σ r], always kept.
  at::Tensor x_, qkv_rows_, sum_, gate_up_rows_;
  at::Tensor qkv_low_, o_low_, gate_up_low_, down_low_;
  RmsNorm::Scales input_scales_, sum_scales_, q_scales_, k_scales_;
  AttentionPass attention_;
};

c10::intrusive_ptr<FrozenLayer> FrozenLayer::of(const DecoderLayer& layer, const DecoderConfig& config,
                                                const at::Tensor& x, const DecoderPass& pass) {
  const ForwardOptions& options = pass.options;
  const auto* mlp = dynamic_cast<const GatedMlp*>(layer.mlp.get());
  const auto drops = [&](double rate) { return ModelDropout{rate}.active_rate(options.dropout) > 0; };
  if (!options.training || !at::GradMode::is_enabled() || !pass.caches.empty() || outputs_observed() ||
      config.norm != NormType::kRms || mlp == nullptr || !pass.rotary.cos.defined() || pass.query_scale.defined() ||
      drops(config.dropout) || drops(config.attention_dropout) || trains(*layer.input_layernorm) ||
      trains(*layer.post_attention_layernorm) || x.dim() != 2 || !x.is_contiguous())
    return {};
  const DecoderAttention& attention = layer.self_attn;
  if (attention.q_norm && (trains(*attention.q_norm) || trains(*attention.k_norm))) return {};
  const auto stack = [&](const std::vector<const Linear*>& linears) {
    return LinearStack::of(linears, x.scalar_type(), options.dropout);
  };
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::vector<const Linear*> projections;
  for (const auto& linear : attention.qkv) projections.push_back(linear.get());
  auto qkv = stack(projections), o = stack({&attention.o_proj}), gate_up = stack({&mlp->gate_proj, &mlp->up_proj}),
       down = stack({&mlp->down_proj});
  if (!qkv || !o || !gate_up || !down) return {};
  if (!x.requires_grad() && !qkv->has_pairs() && !o->has_pairs() && !gate_up->has_pairs() && !down->has_pairs())
    return {};
  auto own = c10::make_intrusive<FrozenLayer>(std::move(*qkv), std::move(*o), std::move(*gate_up), std::move(*down));
  own->input_norm_ = static_cast<const RmsNorm*>(layer.input_layernorm.get());
  own->post_attention_norm_ = static_cast<const RmsNorm*>(layer.post_attention_layernorm.get());
  if (attention.q_norm) {
    own->q_norm_ = &*attention.q_norm;
    own->k_norm_ = &*attention.k_norm;
  }
  own->num_heads_ = config.num_heads;
  own->num_kv_heads_ = config.num_kv_heads;
  own->head_dim_ = config.head_dim;
  own->rotary_ = pass.rotary;
  own->rows_ = pass.rows;
  own->job_ = options.job;
  own->recompute_ = options.recompute;
  return own;
}

at::Tensor FrozenLayer::attend(Fp8Rows& codes) {
  const int64_t tokens = x_.size(0);
  {
    Fp8Rows of_input;
    const at::Tensor normed =
        input_norm_->forward(x_, input_scales_, qkv_.empty_input(tokens), qkv_.is_fp8() ? &of_input : nullptr);
    qkv_rows_ = qkv_.forward(normed, qkv_low_, qkv_.empty_output(tokens), of_input);
  }
  const int64_t q_heads = num_heads_, kv_heads = num_kv_heads_;
  at::Tensor q = heads(qkv_rows_, 0, q_heads), k = heads(qkv_rows_, q_heads, kv_heads);
  const at::Tensor v = heads(qkv_rows_, q_heads + kv_heads, kv_heads);
  if (q_norm_ != nullptr) {
    // The norms' inputs stay in q|k|v.
    q = q_norm_->forward(q.contiguous(), q_scales_);
    k = k_norm_->forward(k.contiguous(), k_scales_);
    rotate(q, q, rotary_, /*inverse=*/false);
    rotate(k, k, rotary_, /*inverse=*/false);
  } else {
    const at::Tensor both = heads(qkv_rows_, 0, q_heads + kv_heads);
    rotate(both, both, rotary_, /*inverse=*/false);
  }
  attention_ = AttentionPass(q, k, v, *rows_);
  sum_ = o_.forward(attention_.out().flatten(1), o_low_);
  return post_attention_norm_->add_forward(sum_, x_, sum_scales_, gate_up_.empty_input(tokens),
                                           gate_up_.is_fp8() ? &codes : nullptr);
}

at::Tensor FrozenLayer::forward(const at::Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;  // some µs less for each operation
  x_ = x.detach();
  Fp8Rows codes;
  const at::Tensor normed = attend(codes);
  gate_up_rows_ = gate_up_.forward(normed, gate_up_low_, gate_up_.empty_output(x.size(0)), codes);
  codes = {};
  const at::Tensor product =
      swiglu_halves(gate_up_rows_, down_.empty_input(x.size(0)), down_.is_fp8() ? &codes : nullptr);
  at::Tensor y = down_.forward(product, down_low_, {}, codes);
  y.add_(sum_);
  if (recompute_ == Recompute::kMlp || recompute_ == Recompute::kLayer) gate_up_rows_.reset();
  if (recompute_ == Recompute::kLayer) {
    for (at::Tensor* kept : {&qkv_rows_, &sum_, &input_scales_, &sum_scales_, &q_scales_, &k_scales_}) kept->reset();
    attention_ = {};
  }
  return y;
}

void FrozenLayer::attention_backward(const at::Tensor& dmixed) {
  const auto [dq, dk, dv] = attention_.backward(dmixed.unflatten(1, {num_heads_, head_dim_}));
  attention_ = {};
  const at::Tensor q = heads(qkv_rows_, 0, num_heads_), k = heads(qkv_rows_, num_heads_, num_kv_heads_);
  if (q_norm_ != nullptr) {
    const auto through_norm = [&](const RmsNorm& norm, const at::Tensor& slot, const RmsNorm::Scales& scales,
                                  const at::Tensor& turned) {
      at::Tensor dy = at::empty(turned.sizes(), turned.options());
      rotate(dy, turned, rotary_, /*inverse=*/true);
      slot.copy_(norm.backward(slot.contiguous(), scales, dy));
    };
    through_norm(*q_norm_, q, q_scales_, dq);
    through_norm(*k_norm_, k, k_scales_, dk);
  } else {
    rotate(q, dq, rotary_, /*inverse=*/true);
    rotate(k, dk, rotary_, /*inverse=*/true);
  }
  put(heads(qkv_rows_, num_heads_ + num_kv_heads_, num_kv_heads_), dv);
}

at::Tensor FrozenLayer::backward(const at::Tensor& dy, bool input_grad) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const int64_t tokens = dy.size(0);
  Fp8Rows codes;
  at::Tensor normed;
  if (recompute_ == Recompute::kLayer) normed = attend(codes);
  if (!gate_up_rows_.defined()) {
    if (!normed.defined())
      normed = post_attention_norm_->forward(sum_, sum_scales_, gate_up_.empty_input(tokens),
                                             gate_up_.is_fp8() ? &codes : nullptr);
    gate_up_rows_ = gate_up_.forward(normed, gate_up_low_, gate_up_.empty_output(tokens), codes);
    normed.reset();
    codes = {};
  }
  // From gate_up_rows_ on, gradients lie where the values were.
  at::Tensor product = down_.backward(dy, down_low_);
  if (gate_up_.is_fp8()) {
    swiglu_halves_backward(gate_up_rows_, product, &codes, gate_up_.gradient_factors());
  } else {
    swiglu_halves_backward(gate_up_rows_, product);
  }
  down_.backward_a(down_low_, product);
  product.reset();
  at::Tensor dnormed = gate_up_.backward(gate_up_rows_, gate_up_low_, codes);
  codes = {};
  gate_up_rows_.reset();
  const at::Tensor dsum = post_attention_norm_->backward_add(sum_, sum_scales_, dnormed, dy, o_.empty_output(tokens));
  sum_.reset();
  gate_up_.backward_a(gate_up_low_, dnormed);
  {
    const at::Tensor dmixed = o_.backward(dsum, o_low_);
    o_.backward_a(o_low_, attention_.out().flatten(1));
    attention_backward(dmixed);
  }
  dnormed = qkv_.backward(qkv_rows_, qkv_low_);
  qkv_rows_.reset();
  at::Tensor dx;
  if (input_grad) {
    // As the layer before, which is like this one, wants it.
    dx = input_norm_->backward_add(x_, input_scales_, dnormed, dsum, down_.empty_output(tokens));
  } else {
    dnormed = input_norm_->forward(x_, input_scales_);
  }
  qkv_.backward_a(qkv_low_, dnormed);
  x_.reset();
  return dx;
}

struct FrozenLayerFunction : public torch::autograd::Function<FrozenLayerFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const c10::intrusive_ptr<FrozenLayer>& layer,
                            bool input_grad) {
    ctx->saved_data["layer"] = c10::IValue::make_capsule(layer);
    ctx->saved_data["input_grad"] = input_grad;
    return layer->forward(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto layer = c10::static_intrusive_pointer_cast<FrozenLayer>(ctx->saved_data["layer"].toCapsule());
    layer->check_cancelled();
    // Rows further apart than they are long come from the layer after this one.
    const at::Tensor& dy = grads[0];
    const bool rows = dy.stride(1) == 1 && dy.stride(0) >= dy.size(1);
    return {layer->backward(rows ? dy : dy.contiguous(), ctx->saved_data["input_grad"].toBool()), at::Tensor(),
            at::Tensor()};
  }
};

}  // namespace

std::optional<at::Tensor> run_frozen_layer(const DecoderLayer& layer, const DecoderConfig& config, const at::Tensor& x,
                                           const DecoderPass& pass) {
  const auto own = FrozenLayer::of(layer, config, x, pass);
  if (!own) return std::nullopt;
  own->check_cancelled();
  // The pairs are not among the function's inputs: without a gradient of x there would be no node.
  return FrozenLayerFunction::apply(x.requires_grad() ? x : x.detach().requires_grad_(true), own, x.requires_grad());
}

namespace {

// Those of one input each.
std::vector<std::vector<Linear*>> stacks_of(DecoderLayer& layer) {
  std::vector<Linear*> projections;
  for (const auto& linear : layer.self_attn.qkv) projections.push_back(linear.get());
  std::vector<std::vector<Linear*>> stacks = {projections, {&layer.self_attn.o_proj}};
  if (auto* mlp = dynamic_cast<GatedMlp*>(layer.mlp.get())) {
    stacks.push_back({&mlp->gate_proj, &mlp->up_proj});
    stacks.push_back({&mlp->down_proj});
  }
  return stacks;
}

}  // namespace

void stack_layer_weights(DecoderLayer& layer, PairForm form) {
  for (const auto& linears : stacks_of(layer)) stack_weights(linears, form);
}

void refresh_layer_pairs(DecoderLayer& layer) {
  for (const auto& linears : stacks_of(layer)) {
    const at::ScalarType dtype = linears[0]->weight.dtype();
    const auto stack = LinearStack::of({linears.begin(), linears.end()}, dtype, /*dropout=*/nullptr);
    if (stack) stack->refresh_pairs();
  }
}

}  // namespace martlet
