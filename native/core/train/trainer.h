// A training run on a loaded model: what is trained, the step, evaluation, saving and resuming. The caller (TypeScript)
// brings rows in order.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/base/job.h"
#include "core/lora/adapter.h"
#include "core/train/batch.h"
#include "core/train/flat_parameters.h"
#include "core/train/lr_schedule.h"

namespace martlet {

struct TrainOptions {
  bool full = false;
  AdapterConfig lora;                     // when not full
  std::vector<std::string> target_names;  // empty with a regex
  std::string target_regex;
  std::string adapter_dir;  // start from this adapter
  FreezeFlags freeze;
  AdamWOptions optimizer;
  LrSchedule schedule;
  double learning_rate = 1e-4;
  double max_grad_norm = 1.0;  // 0 = no clipping
  bool recompute = false;
  uint64_t seed = 42;
};

struct PartCounts {
  int64_t vision = 0, projector = 0, language = 0;
  int64_t total() const { return vision + projector + language; }
};

struct StepResult {
  int64_t step = 0;  // from 1
  double loss = 0, grad_norm = 0, learning_rate = 0;
  int64_t tokens = 0, labelled = 0, correct = 0;
};

using MicroBatch = std::vector<Sample>;

class Trainer {
 public:
  // `model_dir` is where weights that are not trained come from when a full model is saved.
  Trainer(VisionLanguageModel& model, const Family& family, std::string model_dir, const TrainOptions& options,
          at::ScalarType dtype, at::Device device);
  ~Trainer();

  // One optimiser step. On cancellation or any error the weights and the step count are as before.
  StepResult step(const std::vector<MicroBatch>& micro_batches, JobContext& job);
  // Loss and accuracy without dropout or an update.
  StepResult evaluate(const std::vector<MicroBatch>& micro_batches, JobContext& job);
  // Gradients of one step, not applied: name → float32 tensor on the CPU. `loss` receives the loss.
  std::vector<std::pair<std::string, at::Tensor>> gradients(const std::vector<MicroBatch>& micro_batches,
                                                            JobContext& job, double& loss);

  std::vector<std::string> save(const std::string& dir, const std::string& base_model, int64_t max_shard_size,
                                JobContext& job) const;
  std::vector<std::string> save_state(const std::string& dir) const;
  int64_t load_state(const std::string& dir);

  PartCounts trainable() const { return trainable_; }
  const TargetSelection& targets() const { return targets_; }
  // The trained adapter, detached from the optimiser; the trainer is of no use afterwards. Empty for full training.
  std::optional<Adapter> release_adapter();

 private:
  // Runs forward (and backward when `train`) over all micro-batches; returns sums.
  StepResult run(const std::vector<MicroBatch>& micro_batches, bool train, JobContext& job);
  std::vector<std::string> save_full(const std::string& dir, int64_t max_shard_size, JobContext& job) const;

  VisionLanguageModel& model_;
  const Family& family_;
  std::string model_dir_;
  TrainOptions options_;
  at::ScalarType dtype_;
  at::Device device_;
  TargetSelection targets_;
  Adapter adapter_;
  PartCounts trainable_;
  std::unique_ptr<FlatParameters> parameters_;
  DropoutSource dropout_;
  int64_t step_ = 0;
};

}  // namespace martlet
