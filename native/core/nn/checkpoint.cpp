#include "core/nn/checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace martlet {
namespace {

struct LayerFunction : torch::CustomClassHolder {
  explicit LayerFunction(std::function<at::Tensor(const at::Tensor&)> f) : fn(std::move(f)) {}
  std::function<at::Tensor(const at::Tensor&)> fn;
};

struct RecomputeFunction : public torch::autograd::Function<RecomputeFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const c10::intrusive_ptr<LayerFunction>& layer) {
    ctx->save_for_backward({x});
    ctx->saved_data["layer"] = c10::IValue::make_capsule(layer);
    const at::NoGradGuard no_grad;
    return layer->fn(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_(true);
    const auto layer = c10::static_intrusive_pointer_cast<LayerFunction>(ctx->saved_data["layer"].toCapsule());
    {
      const at::AutoGradMode enable(true);
      const at::Tensor y = layer->fn(x);
      torch::autograd::backward({y}, {grads[0]});
    }
    return {x.grad(), at::Tensor()};
  }
};

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

at::Tensor run_layer(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x,
                     const ForwardOptions& options) {
  if (options.job != nullptr) options.job->check();
  if (!x.requires_grad()) return fn(x);
  at::Tensor y =
      options.recompute ? RecomputeFunction::apply(x, c10::make_intrusive<LayerFunction>(std::move(fn))) : fn(x);
  // The job outlives the backward pass, which it runs.
  return options.job == nullptr ? y : CancellableFunction::apply(y, reinterpret_cast<int64_t>(options.job));
}

}  // namespace martlet
