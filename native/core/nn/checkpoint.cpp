#include "core/nn/checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace martlet {
namespace {

using LayerBody = std::function<at::Tensor(const at::Tensor& x, const at::Tensor& memory)>;

struct LayerFunction : torch::CustomClassHolder {
  explicit LayerFunction(LayerBody f) : fn(std::move(f)) {}
  LayerBody fn;
};

struct RecomputeFunction : public torch::autograd::Function<RecomputeFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const std::optional<at::Tensor>& memory, const c10::intrusive_ptr<LayerFunction>& layer) {
    ctx->save_for_backward({x, memory.value_or(at::Tensor())});
    ctx->saved_data["layer"] = c10::IValue::make_capsule(layer);
    const at::NoGradGuard no_grad;
    return layer->fn(x, memory.value_or(at::Tensor()));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto leaf = [](const at::Tensor& t) {
      return t.defined() ? t.detach().requires_grad_(t.requires_grad()) : at::Tensor();
    };
    const at::Tensor x = leaf(saved[0]), memory = leaf(saved[1]);
    const auto layer = c10::static_intrusive_pointer_cast<LayerFunction>(ctx->saved_data["layer"].toCapsule());
    {
      const at::AutoGradMode enable(true);
      const at::Tensor y = layer->fn(x, memory);
      torch::autograd::backward({y}, {grads[0]});
    }
    return {x.grad(), memory.defined() ? memory.grad() : at::Tensor(), at::Tensor()};
  }
};

at::Tensor run_again(LayerBody fn, const at::Tensor& x, const at::Tensor& memory) {
  return RecomputeFunction::apply(x, memory.defined() ? std::optional(memory) : std::nullopt,
                                  c10::make_intrusive<LayerFunction>(std::move(fn)));
}

// The identity; its backward asks whether the job was cancelled.
struct CancellableFunction : public torch::autograd::Function<CancellableFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, int64_t job) {
    ctx->saved_data["job"] = job;
    return x.view_as(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    reinterpret_cast<const JobContext*>(ctx->saved_data["job"].toInt())->check();
    return {grads[0], at::Tensor()};
  }
};

}  // namespace

at::Tensor run_layer(std::function<at::Tensor(const at::Tensor&, const at::Tensor&)> fn, const at::Tensor& x,
                     const at::Tensor& memory, const ForwardOptions& options) {
  if (options.job != nullptr) options.job->check();
  if (!x.requires_grad() && !(memory.defined() && memory.requires_grad())) return fn(x, memory);
  const bool again = options.recompute == Recompute::kLayer;
  // A layer that is run again as a whole keeps everything for the moment between its second run and its backward.
  const CheapRecompute cheap(options.recompute == Recompute::kCheap || options.recompute == Recompute::kMlp);
  // A view, where nothing is run again: the layer's gradients of x add up among themselves before those of other
  // readers join them, as they do where it is.
  at::Tensor y = again ? run_again(std::move(fn), x, memory) : fn(x.view_as(x), memory);
  // The job outlives the backward pass, which it runs.
  return options.job == nullptr ? y : CancellableFunction::apply(y, reinterpret_cast<int64_t>(options.job));
}

at::Tensor run_layer(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x,
                     const ForwardOptions& options) {
  return run_layer([fn = std::move(fn)](const at::Tensor& y, const at::Tensor&) { return fn(y); }, x, at::Tensor(),
                   options);
}

at::Tensor run_mlp(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x,
                   const ForwardOptions& options) {
  if (!x.requires_grad()) return fn(x);
  if (options.recompute != Recompute::kMlp) return fn(x.view_as(x));
  return run_again([fn = std::move(fn)](const at::Tensor& y, const at::Tensor&) { return fn(y); }, x, at::Tensor());
}

namespace {

thread_local bool cheap_on = false;
// Tensors of this forward pass that can be made again. Weak: an entry is of no use once its tensor is gone.
struct Remembered {
  Remembered(const c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>& t, Recipe r)
      : tensor(t), recipe(std::move(r)) {}
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
  Recipe recipe;
};
thread_local std::vector<Remembered> remembered;

}  // namespace

CheapRecompute::CheapRecompute(bool on) : before_(cheap_on) { cheap_on = on; }
CheapRecompute::~CheapRecompute() {
  cheap_on = before_;
  if (!cheap_on) remembered.clear();
}

at::Tensor run_cheap(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& fn,
                     const std::vector<at::Tensor>& inputs) {
  const at::Tensor y = fn(inputs);
  if (!cheap_on || !y.requires_grad()) return y;
  std::erase_if(remembered, [](const Remembered& entry) { return entry.tensor.expired(); });
  // Detached, or the recipe would keep the graph that keeps the recipe.
  std::vector<at::Tensor> kept;
  for (const at::Tensor& input : inputs) kept.push_back(input.detach());
  remembered.emplace_back(y.getIntrusivePtr(), [fn, kept] {
    const at::NoGradGuard no_grad;
    return fn(kept);
  });
  return y;
}

const Recipe* recipe_of(const at::Tensor& x) {
  for (const Remembered& entry : remembered) {
    if (!entry.tensor.expired() && entry.tensor._unsafe_get_target() == x.unsafeGetTensorImpl()) return &entry.recipe;
  }
  return nullptr;
}

}  // namespace martlet
