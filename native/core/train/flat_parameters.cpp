#include "core/train/flat_parameters.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "core/base/error.h"

namespace martlet {

FlatParameters::FlatParameters(std::vector<TrainedParameter> parameters, std::vector<ParameterGroup> groups,
                               at::Device device)
    : parameters_(std::move(parameters)), groups_(std::move(groups)) {
  const at::NoGradGuard no_grad;
  std::stable_sort(parameters_.begin(), parameters_.end(), [](const TrainedParameter& a, const TrainedParameter& b) {
    return std::pair(a.dtype, a.group) < std::pair(b.dtype, b.group);
  });
  offsets_.push_back(0);
  for (const TrainedParameter& p : parameters_) {
    shapes_.push_back(p.slot->sizes().vec());
    const int64_t begin = offsets_.back(), end = begin + p.slot->numel();
    offsets_.push_back(end);
    if (!ranges_.empty() && ranges_.back().group == p.group) {
      ranges_.back().end = end;
    } else {
      ranges_.push_back({begin, end, p.group});
    }
  }
  const auto f32 = at::TensorOptions().dtype(at::kFloat).device(device);
  master_ = at::empty({offsets_.back()}, f32);
  grad_ = at::zeros_like(master_);
  for (size_t i = 0; i < parameters_.size(); ++i) master_view(i).copy_(*parameters_[i].slot);
  for (size_t i = 0; i < parameters_.size();) {
    const at::ScalarType dtype = parameters_[i].dtype;
    const size_t first = i;
    while (i < parameters_.size() && parameters_[i].dtype == dtype) ++i;
    at::Tensor values = master_, grads = grad_;
    int64_t origin = 0;
    if (dtype != at::kFloat) {
      origin = offsets_[first];
      values = master_.narrow(0, origin, offsets_[i] - origin).to(dtype);
      grads = at::zeros_like(values);
      rounded_.push_back({origin, offsets_[i], values, grads});
    }
    for (size_t k = first; k < i; ++k) {
      at::Tensor leaf = view(values, k, origin).detach().requires_grad_(true);
      leaf.mutable_grad() = view(grads, k, origin);
      *parameters_[k].slot = leaf;
    }
  }
}

FlatParameters::~FlatParameters() {
  const at::NoGradGuard no_grad;
  for (const TrainedParameter& p : parameters_) *p.slot = p.slot->detach().clone();
}

at::Tensor FlatParameters::view(const at::Tensor& flat, size_t i, int64_t origin) const {
  return flat.narrow(0, offsets_[i] - origin, offsets_[i + 1] - offsets_[i]).view(shapes_[i]);
}

void FlatParameters::refresh_compute() {
  const at::NoGradGuard no_grad;
  for (Rounded& part : rounded_) part.values.copy_(master_.narrow(0, part.begin, part.end - part.begin));
}

void FlatParameters::zero_grad() {
  grad_.zero_();
  for (Rounded& part : rounded_) part.grads.zero_();
}

void FlatParameters::collect_micro_batch() {
  for (Rounded& part : rounded_) {
    grad_.narrow(0, part.begin, part.end - part.begin).add_(part.grads);
    part.grads.zero_();
  }
}

void copy_state(const NamedTensors& own, const NamedTensors& stored) {
  const at::NoGradGuard no_grad;
  std::vector<const at::Tensor*> values;
  for (const auto& [name, tensor] : own) {
    const auto it =
        std::find_if(stored.begin(), stored.end(), [&, n = name](const auto& entry) { return entry.first == n; });
    if (it == stored.end() || it->second.sizes() != tensor.sizes()) {
      fail(code::kIo, "The optimiser state of the checkpoint does not fit this run (\"" + name +
                          "\"): resume with the configuration that the run was started with.");
    }
    values.push_back(&it->second);
  }
  for (size_t i = 0; i < own.size(); ++i) own[i].second.copy_(*values[i]);
}

}  // namespace martlet
