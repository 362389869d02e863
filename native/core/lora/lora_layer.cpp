#include "core/lora/lora_layer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/base/rng.h"

namespace martlet {

at::Tensor DropoutSource::mask(const at::Tensor& like, double p, int64_t index) {
  {
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_current_seed(mix_seed(seed, static_cast<uint64_t>(index)));
  }
  return at::empty_like(like, like.options().dtype(at::kBool)).bernoulli_(1.0 - p, generator);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LoraLinearFunction : public torch::autograd::Function<LoraLinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& a, const at::Tensor& b,
                            const std::optional<at::Tensor>& mask, double scaling, double keep) {
    at::Tensor y = at::linear(x, weight, bias);
    const at::Tensor input = mask ? x * *mask / keep : x;
    const at::Tensor h = at::mm(input, a.t());  // [T, r]
    y.addmm_(h, b.t(), 1, scaling);
    ctx->save_for_backward({x, weight, a, b, h, mask.value_or(at::Tensor())});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["keep"] = keep;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &a = saved[2], &b = saved[3], &h = saved[4], &mask = saved[5];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const double keep = ctx->saved_data["keep"].toDouble();
    const at::Tensor& dy = grads[0];
    const at::Tensor dh = at::mm(dy, b).mul_(scaling);  // [T, r]
    at::Tensor dx, dweight, dbias;
    if (ctx->needs_input_grad(0)) {
      dx = at::mm(dy, weight);
      if (mask.defined()) {
        dx.add_(at::mm(dh, a).mul_(mask).div_(keep));
      } else {
        dx.addmm_(dh, a);
      }
    }
    if (ctx->needs_input_grad(1)) dweight = at::mm(dy.t(), x);
    // An absent optional tensor takes no place among the inputs that gradients are asked for.
    const size_t after_bias = ctx->saved_data["has_bias"].toBool() ? 1 : 0;
    if (after_bias == 1 && ctx->needs_input_grad(2)) dbias = dy.sum(0);
    at::Tensor da, db;
    if (ctx->needs_input_grad(2 + after_bias)) da = at::mm(dh.t(), mask.defined() ? x * mask / keep : x);
    if (ctx->needs_input_grad(3 + after_bias)) db = at::mm(dy.t(), h).mul_(scaling);
    return {dx, dweight, dbias, da, db, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const LoraLayer& lora,
                       DropoutSource* dropout) {
  at::Tensor mask;
  if (dropout != nullptr && lora.dropout > 0) mask = dropout->mask(x, lora.dropout, lora.index);
  const auto optional = [](const at::Tensor& t) { return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt; };
  return LoraLinearFunction::apply(x, weight, optional(bias), lora.a, lora.b, optional(mask), lora.scaling,
                                   1.0 - lora.dropout);
}

}  // namespace martlet
