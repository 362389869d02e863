// Where dropout masks come from, and the dropout that a model itself has (config.json's); LoRA's is in lora/.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace martlet {

// There during a training forward; absent in evaluation and inference. The mask of a place depends only on (seed of the
// run, step, micro-batch, place), so a resumed or recomputed step draws the same one.
struct DropoutSource {
  at::Generator generator;
  uint64_t seed = 0;
  // Stands in place of every rate above 0 that the model has itself.
  std::optional<double> model_rate;
  // Bool mask of the shape of `like`, true = kept; the same each time for the same index.
  at::Tensor mask(const at::Tensor& like, double p, int64_t index) const;
};

// One place where a model drops. Two places of a model must not be alike.
struct ModelDropout {
  enum Stack : int64_t { kDecoder, kEncoder, kProjector };
  double rate = 0;
  Stack stack = kDecoder;
  int64_t layer = 0;
  int64_t place = 0;  // within the layer

  // 0 without a source.
  double active_rate(const DropoutSource* source) const;
  // `part`: tells several tensors of one place apart.
  at::Tensor forward(const at::Tensor& x, const DropoutSource* source, int64_t part = 0) const;
};

}  // namespace martlet
