#include "core/train/flat_parameters.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "core/base/error.h"

namespace martlet {

FlatParameters::FlatParameters(std::vector<TrainedParameter> parameters, at::ScalarType compute_dtype,
                               at::Device device)
    : parameters_(std::move(parameters)) {
  const at::NoGradGuard no_grad;
  std::stable_partition(parameters_.begin(), parameters_.end(), [](const TrainedParameter& p) { return p.decay; });
  offsets_.push_back(0);
  for (const TrainedParameter& p : parameters_) {
    shapes_.push_back(p.slot->sizes().vec());
    offsets_.push_back(offsets_.back() + p.slot->numel());
    if (p.decay) decayed_ = offsets_.back();
  }
  const auto f32 = at::TensorOptions().dtype(at::kFloat).device(device);
  master_ = at::empty({offsets_.back()}, f32);
  grad_ = at::zeros_like(master_);
  exp_avg_ = at::zeros_like(master_);
  exp_avg_sq_ = at::zeros_like(master_);
  step_ = at::zeros({}, f32);
  for (size_t i = 0; i < parameters_.size(); ++i) master_view(i).copy_(*parameters_[i].slot);
  if (compute_dtype != at::kFloat) {
    compute_ = at::empty({offsets_.back()}, f32.dtype(compute_dtype));
    compute_grad_ = at::zeros_like(compute_);
    refresh_compute();
  }
  const at::Tensor& values = compute_.defined() ? compute_ : master_;
  const at::Tensor& grads = compute_.defined() ? compute_grad_ : grad_;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    at::Tensor leaf = view(values, i).detach().requires_grad_(true);
    leaf.mutable_grad() = view(grads, i);
    *parameters_[i].slot = leaf;
  }
}

FlatParameters::~FlatParameters() {
  const at::NoGradGuard no_grad;
  for (const TrainedParameter& p : parameters_) *p.slot = p.slot->detach().clone();
}

at::Tensor FlatParameters::view(const at::Tensor& flat, size_t i) const {
  return flat.narrow(0, offsets_[i], offsets_[i + 1] - offsets_[i]).view(shapes_[i]);
}

void FlatParameters::refresh_compute() {
  if (compute_.defined()) compute_.copy_(master_);
}

void FlatParameters::zero_grad() {
  grad_.zero_();
  if (compute_grad_.defined()) compute_grad_.zero_();
}

void FlatParameters::collect_micro_batch() {
  if (!compute_grad_.defined()) return;
  grad_.add_(compute_grad_);
  compute_grad_.zero_();
}

void FlatParameters::adamw_step(double learning_rate, const AdamWOptions& options) {
  const at::NoGradGuard no_grad;
  step_.add_(1);
  const auto update = [&](int64_t start, int64_t length, double weight_decay) {
    if (length == 0) return;
    const auto part = [&](const at::Tensor& flat) { return flat.narrow(0, start, length); };
    at::_fused_adamw_({part(master_)}, {part(grad_)}, {part(exp_avg_)}, {part(exp_avg_sq_)}, {}, {step_}, learning_rate,
                      options.beta1, options.beta2, weight_decay, options.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false);
  };
  update(0, decayed_, options.weight_decay);
  update(decayed_, size() - decayed_, 0.0);
  refresh_compute();
}

std::vector<std::pair<std::string, at::Tensor>> FlatParameters::state() const {
  return {{"master", master_}, {"exp_avg", exp_avg_}, {"exp_avg_sq", exp_avg_sq_}, {"step", step_.view({1})}};
}

void FlatParameters::load_state(const std::vector<std::pair<std::string, at::Tensor>>& state) {
  const at::NoGradGuard no_grad;
  const std::vector<std::pair<std::string, at::Tensor>> own = this->state();
  for (const auto& [name, tensor] : own) {
    const auto it =
        std::find_if(state.begin(), state.end(), [&, n = name](const auto& entry) { return entry.first == n; });
    if (it == state.end() || it->second.sizes() != tensor.sizes()) {
      fail(code::kIo, "The optimiser state of the checkpoint does not fit this run (\"" + name +
                          "\"): resume with the configuration that the run was started with.");
    }
    tensor.copy_(it->second);
  }
  refresh_compute();
}

}  // namespace martlet
