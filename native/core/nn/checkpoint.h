// One layer of a stack: can be cancelled between layers in both directions, and can be recomputed in the backward pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "core/base/job.h"
#include "core/lora/lora_layer.h"

namespace martlet {

struct ForwardOptions {
  DropoutSource* dropout = nullptr;  // training only
  bool recompute = false;            // keep only each layer's input, run the layer again in the backward pass
  bool training = false;             // some models read long rows otherwise at inference
  const JobContext* job = nullptr;   // asked for cancellation at each layer, forward and backward
};

// fn(x). With `recompute`, parameters that fn uses get their gradients during the second run, in their .grad.
at::Tensor run_layer(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x,
                     const ForwardOptions& options);

}  // namespace martlet
