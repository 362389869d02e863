// Optimisers over flat parameters. State is float32 (or 8-bit codes), on the parameters' device or in pinned host
// memory.
#pragma once

#include <memory>
#include <string>

#include "core/train/flat_parameters.h"

namespace martlet {

struct OptimizerOptions {
  enum class Type {
    kAdamW,      // Loshchilov & Hutter 2019, torch.optim.AdamW
    kAdamW8bit,  // the same with moments in 8-bit blocks of 256: bitsandbytes.optim.AdamW8bit
    kSgd,        // torch.optim.SGD: the decay is added to the gradient
    kAdafactor,  // transformers.optimization.Adafactor with relative_step=False, scale_parameter=False
  };
  Type type = Type::kAdamW;
  bool paged =
      false;  // AdamW: moments in pinned host memory, moved to the device a chunk at a time. On the CPU as without
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double momentum = 0;  // SGD
  bool nesterov = false;
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  // One update with the gradients in the flat buffer; each group's rate is its base rate times `factor`.
  void step(double factor);

  // For checkpoints: the moments and the number of updates.
  virtual NamedTensors state() const = 0;
  void load_state(const NamedTensors& stored) { copy_state(state(), stored); }

 protected:
  Optimizer(const OptimizerOptions& options, FlatParameters& parameters) : options_(options), parameters_(parameters) {}
  virtual void update(double factor) = 0;

  OptimizerOptions options_;
  FlatParameters& parameters_;
};

std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options, FlatParameters& parameters);

}  // namespace martlet
