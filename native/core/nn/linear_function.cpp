#include "core/nn/linear_function.h"

#include <ATen/ATen.h>

#include "core/nn/checkpoint.h"
#include "core/nn/matvec.h"

namespace martlet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kRecipe = "recipe";

struct RecipeHolder : torch::CustomClassHolder {
  explicit RecipeHolder(Recipe r) : recipe(std::move(r)) {}
  Recipe recipe;
};

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

struct BaseLinearFunction : public torch::autograd::Function<BaseLinearFunction> {
  // `weight` is absent where `quantized` stands for it; `bias` may be absent.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias,
                            const c10::intrusive_ptr<QuantizedHolder>& quantized) {
    // The input is needed for the weight's gradient alone.
    const bool weight_grad = weight.has_value() && weight->requires_grad();
    ctx->save_for_backward({weight_grad ? KeptInput::keep(ctx, x) : at::Tensor(), weight.value_or(at::Tensor())});
    if (quantized) ctx->saved_data["quantized"] = c10::IValue::make_capsule(quantized);
    ctx->saved_data["has_weight"] = weight.has_value();
    ctx->saved_data["has_bias"] = bias.has_value();
    return quantized ? quantized->weight->linear(x, bias.value_or(at::Tensor())) : at::linear(x, *weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& dy = grads[0];
    at::Tensor dx, dweight, dbias;
    // An absent optional tensor takes no place among the inputs that gradients are asked for.
    size_t next = 1;
    if (ctx->needs_input_grad(0)) dx = QuantizedHolder::input_gradient(ctx, dy, saved[1]);
    if (ctx->saved_data["has_weight"].toBool() && ctx->needs_input_grad(next++))
      dweight = at::mm(dy.t(), KeptInput::restore(ctx, saved[0]));
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(next)) dbias = dy.sum(0);
    return {dx, dweight, dbias, at::Tensor()};
  }
};

}  // namespace

at::Tensor QuantizedHolder::input_gradient(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& dense) {
  const auto it = ctx->saved_data.find("quantized");
  if (it == ctx->saved_data.end()) return at::mm(dy, dense);
  return c10::static_intrusive_pointer_cast<QuantizedHolder>(it->second.toCapsule())->weight->input_gradient(dy);
}

at::Tensor KeptInput::keep(AutogradContext* ctx, const at::Tensor& x) {
  if (const Recipe* recipe = recipe_of(x)) {
    ctx->saved_data[kRecipe] = c10::IValue::make_capsule(c10::make_intrusive<RecipeHolder>(*recipe));
    return at::Tensor();
  }
  return x;
}

at::Tensor KeptInput::restore(AutogradContext* ctx, const at::Tensor& saved) {
  const auto it = ctx->saved_data.find(kRecipe);
  if (it == ctx->saved_data.end()) return saved;
  return c10::static_intrusive_pointer_cast<RecipeHolder>(it->second.toCapsule())->recipe();
}

at::Tensor base_linear(const at::Tensor& x, const Parameter& weight, const at::Tensor& bias) {
  if (weight.value.defined()) {
    if (!weight.value.requires_grad() || recipe_of(x) == nullptr) return product(x, weight.value, bias);
    return BaseLinearFunction::apply(x, optional(weight.value), optional(bias), c10::intrusive_ptr<QuantizedHolder>());
  }
  if (!x.requires_grad() && !(bias.defined() && bias.requires_grad())) return product(x, *weight.quantized, bias);
  return BaseLinearFunction::apply(x, std::optional<at::Tensor>(), optional(bias),
                                   c10::make_intrusive<QuantizedHolder>(weight.quantized));
}

}  // namespace martlet
