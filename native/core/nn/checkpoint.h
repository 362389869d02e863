// Activation recompute: a layer keeps only its input and is run again in the backward pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace martlet {

// fn(x) without keeping what it computed; x must require grad for gradients to flow. Parameters that fn uses get their
// gradients during the second run, in their .grad.
at::Tensor recompute_in_backward(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x);

}  // namespace martlet
