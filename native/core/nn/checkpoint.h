// One layer of a stack: can be cancelled between layers in both directions. What is computed again in the backward pass
// instead of being kept: nothing, the cheap parts, the MLP, or the whole layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "core/base/job.h"
#include "core/nn/dropout.h"

namespace martlet {

enum class Recompute {
  kNone,
  kCheap,  // norms and the MLP's elementwise product: linears make their inputs again
  kMlp,    // the MLP with its norm, and the cheap parts
  kLayer,  // only each layer's input is kept
};

struct ForwardOptions {
  DropoutSource* dropout = nullptr;  // training only
  Recompute recompute = Recompute::kNone;
  bool training = false;            // some models read long rows otherwise at inference
  const JobContext* job = nullptr;  // asked for cancellation at each layer, forward and backward
};

// fn(x). With Recompute::kLayer, parameters that fn uses get their gradients during the second run, in their .grad.
at::Tensor run_layer(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x,
                     const ForwardOptions& options);
// fn(x, memory): a layer that also reads what another stack gave, which gets a gradient as well.
at::Tensor run_layer(std::function<at::Tensor(const at::Tensor&, const at::Tensor&)> fn, const at::Tensor& x,
                     const at::Tensor& memory, const ForwardOptions& options);
// fn(x), where fn is a layer's second half (x + MLP of its norm): run again in the backward pass with Recompute::kMlp.
at::Tensor run_mlp(std::function<at::Tensor(const at::Tensor&)> fn, const at::Tensor& x, const ForwardOptions& options);

// fn(inputs) for a cheap fn whose result only linears read. While a CheapRecompute lives, those linears keep how the
// result is made instead of the result. Not for fns that draw random numbers.
at::Tensor run_cheap(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& fn,
                     const std::vector<at::Tensor>& inputs);
class CheapRecompute {
 public:
  explicit CheapRecompute(bool on);
  ~CheapRecompute();
  CheapRecompute(const CheapRecompute&) = delete;
  CheapRecompute& operator=(const CheapRecompute&) = delete;

 private:
  bool before_;
};
// How a tensor made by run_cheap is made again, without autograd; null for any other tensor.
using Recipe = std::function<at::Tensor()>;
const Recipe* recipe_of(const at::Tensor& x);

}  // namespace martlet
