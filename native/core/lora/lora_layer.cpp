#include "core/lora/lora_layer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/nn/linear_function.h"
#include "core/nn/matvec.h"

namespace martlet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The mask of one layer, drawn again in the backward pass: a byte an element is a third of what a layer keeps.
struct MaskHolder : torch::CustomClassHolder {
  MaskHolder(DropoutSource s, double probability, int64_t layer) : source(std::move(s)), p(probability), index(layer) {}
  at::Tensor draw(const at::Tensor& like) const { return source.mask(like, p, index); }
  DropoutSource source;
  double p;
  int64_t index;
};

struct LoraLinearFunction : public torch::autograd::Function<LoraLinearFunction> {
  // `weight` is absent where `quantized` stands for it; `bias` may be absent, `mask` null. (An undefined tensor would
  // have no device to be asked for.) `recorded`: gradients may be asked for, which are those of the dense product.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& a, const at::Tensor& b,
                            const c10::intrusive_ptr<QuantizedHolder>& quantized,
                            const c10::intrusive_ptr<MaskHolder>& mask, double scaling, bool recorded) {
    at::Tensor y;
    if (recorded) {
      y = quantized ? quantized->weight->linear(x, bias.value_or(at::Tensor())) : at::linear(x, *weight, bias);
    } else {
      const at::Tensor own_bias = bias.value_or(at::Tensor());
      y = quantized ? product(x, *quantized->weight, own_bias) : product(x, *weight, own_bias);
    }
    const at::Tensor h = at::mm(dropped(x, mask).to(a.scalar_type()), a.t());  // [T, r]
    if (a.scalar_type() == y.scalar_type()) {
      y.addmm_(h, b.t(), 1, scaling);
    } else {
      y.add_(at::mm(h, b.t()), scaling);
    }
    ctx->save_for_backward({KeptInput::keep(ctx, x), weight.value_or(at::Tensor()), a, b, h});
    if (quantized) ctx->saved_data["quantized"] = c10::IValue::make_capsule(quantized);
    if (mask) ctx->saved_data["mask"] = c10::IValue::make_capsule(mask);
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["has_weight"] = weight.has_value();
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &a = saved[2], &b = saved[3], &h = saved[4];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const bool has_weight = ctx->saved_data["has_weight"].toBool(), has_bias = ctx->saved_data["has_bias"].toBool();
    // An absent optional tensor takes no place among the inputs that gradients are asked for.
    size_t next = 1;
    const bool weight_grad = has_weight && ctx->needs_input_grad(next++);
    const bool bias_grad = has_bias && ctx->needs_input_grad(next++);
    const bool a_grad = ctx->needs_input_grad(next++), b_grad = ctx->needs_input_grad(next++);
    c10::intrusive_ptr<MaskHolder> mask;
    if (const auto it = ctx->saved_data.find("mask"); it != ctx->saved_data.end())
      mask = c10::static_intrusive_pointer_cast<MaskHolder>(it->second.toCapsule());
    const at::Tensor& dy = grads[0];
    const at::Tensor dy_low = dy.to(a.scalar_type());
    const at::Tensor dh = at::mm(dy_low, b).mul_(scaling);  // [T, r]
    at::Tensor dx, dweight, dbias, da, db;
    if (ctx->needs_input_grad(0)) {
      dx = QuantizedHolder::input_gradient(ctx, dy, saved[1]);
      if (mask) {
        dx.add_(at::mm(dh, a).mul_(mask->draw(dx)).div_(1.0 - mask->p));
      } else if (a.scalar_type() == dx.scalar_type()) {
        dx.addmm_(dh, a);
      } else {
        dx.add_(at::mm(dh, a));
      }
    }
    if (weight_grad || a_grad) {
      const at::Tensor x = KeptInput::restore(ctx, saved[0]);
      if (weight_grad) dweight = at::mm(dy.t(), x);
      if (a_grad) da = at::mm(dh.t(), dropped(x, mask).to(a.scalar_type()));
    }
    if (bias_grad) dbias = dy.sum(0);
    if (b_grad) db = at::mm(dy_low.t(), h).mul_(scaling);
    return {dx, dweight, dbias, da, db, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }

 private:
  static at::Tensor dropped(const at::Tensor& x, const c10::intrusive_ptr<MaskHolder>& mask) {
    return mask ? x * mask->draw(x) / (1.0 - mask->p) : x;
  }
};

at::Tensor pair_linear(const at::Tensor& x, const Parameter& weight, const at::Tensor& bias, const LoraLayer& lora,
                       const DropoutSource* dropout) {
  c10::intrusive_ptr<QuantizedHolder> quantized;
  if (!weight.value.defined()) quantized = c10::make_intrusive<QuantizedHolder>(weight.quantized);
  c10::intrusive_ptr<MaskHolder> mask;
  if (dropout != nullptr) mask = c10::make_intrusive<MaskHolder>(*dropout, lora.dropout, lora.index);
  const auto optional = [](const at::Tensor& t) { return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt; };
  return LoraLinearFunction::apply(x, optional(weight.value), optional(bias), lora.a, lora.b, quantized, mask,
                                   lora.scaling, at::GradMode::is_enabled());
}

}  // namespace

at::Tensor row_norms(const Parameter& weight, const LoraLayer& lora) {
  const at::NoGradGuard no_grad;
  const at::Tensor w = weight.dense(), a = lora.a.detach().to(at::kFloat), b = lora.b.detach().to(at::kFloat);
  at::Tensor out = at::empty({w.size(0)}, a.options());
  // 4 M elements = 16 MB of float32 at a time.
  const int64_t step = std::max<int64_t>(1, (int64_t{4} << 20) / w.size(1));
  for (int64_t begin = 0; begin < w.size(0); begin += step) {
    const int64_t count = std::min(step, w.size(0) - begin);
    const at::Tensor rows =
        at::addmm(w.narrow(0, begin, count).to(at::kFloat), b.narrow(0, begin, count), a, 1.0, lora.scaling);
    out.narrow(0, begin, count).copy_(at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}));
  }
  return out;
}

void refresh_weight_norm(const Parameter& weight, LoraLayer& lora) { lora.weight_norm = row_norms(weight, lora); }

at::Tensor lora_linear(const at::Tensor& x, const Parameter& weight, const at::Tensor& bias, const LoraLayer& lora,
                       DropoutSource* dropout) {
  if (dropout != nullptr && lora.dropout == 0) dropout = nullptr;
  if (!lora.magnitude.defined()) return pair_linear(x, weight, bias, lora, dropout);
  // PEFT drops the input of the base product too: y = W x + bias − W d + m/‖·‖ · (W d + s B A d) with d = dropout(x).
  const at::Tensor kept =
      dropout != nullptr ? x * dropout->mask(x, lora.dropout, lora.index) / (1.0 - lora.dropout) : x;
  const at::Tensor factor = lora.magnitude / lora.weight_norm;
  at::Tensor y = pair_linear(kept, weight, at::Tensor(), lora, nullptr) * factor.to(x.scalar_type());
  if (dropout != nullptr) return y + base_linear(x - kept, weight, bias);
  return bias.defined() ? y + bias : y;
}

}  // namespace martlet
