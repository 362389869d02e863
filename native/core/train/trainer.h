// A training run on a loaded model: what is trained, the step, evaluation, saving and resuming. The caller (TypeScript)
// brings rows in order.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/base/job.h"
#include "core/lora/adapter.h"
#include "core/train/batch.h"
#include "core/train/flat_parameters.h"
#include "core/train/flops.h"
#include "core/train/loss_scaler.h"
#include "core/train/lr_schedule.h"
#include "core/train/optimizer.h"
#include "core/train/parameter_selection.h"

namespace martlet {

struct TrainOptions {
  bool full = false;
  AdapterConfig lora;  // when not full
  LoraInit init;
  std::optional<at::ScalarType> lora_dtype;  // of the pairs; absent = computed in the model's dtype, saved in float32
  std::vector<std::string> target_names;     // empty with a regex
  std::string target_regex;
  std::string adapter_dir;  // start from this adapter
  FreezeFlags freeze;
  SavedModuleOptions saved;  // its rules hold for full training too
  OptimizerOptions optimizer;
  RateOptions rates;
  LrSchedule schedule;
  double max_grad_norm = 1.0;     // 0 = no clipping
  std::optional<double> dropout;  // in place of the model's own rates; LoRA's is apart
  double neftune_alpha = 0;       // NEFTune (Jain et al. 2023): noise on the text embeddings; 0 = none
  double label_smoothing = 0;
  Recompute recompute = Recompute::kNone;
  bool vision_recompute = false;  // whole layers of a vision tower that is trained
  uint64_t seed = 42;
};

struct PartCounts {
  int64_t vision = 0, projector = 0, language = 0;
  int64_t total() const { return vision + projector + language; }
  void add(Part part, int64_t n) {
    (part == Part::kVision ? vision : part == Part::kProjector ? projector : language) += n;
  }
};

struct StepResult {
  int64_t step = 0;  // from 1
  double loss = 0, grad_norm = 0, learning_rate = 0;
  int64_t tokens = 0, labelled = 0, correct = 0;
  bool overflow = false;  // float16: the scaled gradients were not finite, nothing was updated
  double loss_scale = 1;  // that the step was computed with
  double flops = 0;       // of the step's products (FlopCounter)
};

using MicroBatch = std::vector<Sample>;

class Trainer {
 public:
  // `model_dir` is where weights that are not trained come from when a full model is saved.
  Trainer(VisionLanguageModel& model, const Family& family, std::string model_dir, const TrainOptions& options,
          at::ScalarType dtype, at::Device device);
  ~Trainer();

  // One optimiser step, the `number`th of the run (from 1; dropout and noise follow from it). On cancellation or any
  // error weights and optimiser are as before.
  StepResult step(int64_t number, const std::vector<MicroBatch>& micro_batches, JobContext& job);
  // Loss and accuracy without dropout or an update.
  StepResult evaluate(const std::vector<MicroBatch>& micro_batches, JobContext& job);
  // Gradients of one step, not applied: name → float32 tensor on the CPU. `loss` receives the loss.
  std::vector<std::pair<std::string, at::Tensor>> gradients(const std::vector<MicroBatch>& micro_batches,
                                                            JobContext& job, double& loss);

  std::vector<std::string> save(const std::string& dir, const std::string& base_model, int64_t max_shard_size,
                                JobContext& job) const;
  std::vector<std::string> save_state(const std::string& dir) const;
  // Gives the number of the step that the state was saved after.
  int64_t load_state(const std::string& dir);

  // Whether a picture's features are the same in each step: nothing before the language model is trained, or dropped
  // out.
  bool features_are_fixed(bool train) const;
  // Where they are then kept.
  void keep_features(FeatureCache* cache) { features_ = cache; }

  int64_t steps_done() const { return step_; }
  PartCounts trainable() const { return trainable_; }
  const TargetSelection& targets() const { return targets_; }
  // Optimiser groups, for reports.
  const std::vector<ParameterGroup>& groups() const { return parameters_->groups(); }
  // The trained adapter, detached from the optimiser; the trainer is of no use afterwards. Empty for full training.
  std::optional<Adapter> release_adapter();

 private:
  // Runs forward (and backward when `train`) over all micro-batches; returns sums.
  StepResult run(int64_t number, const std::vector<MicroBatch>& micro_batches, bool train, JobContext& job);
  void begin_full(std::vector<TrainedParameter>& trained, GroupBuilder& groups);
  void begin_lora(std::vector<TrainedParameter>& trained, GroupBuilder& groups);
  void warn_of_thawed_parts();
  at::Tensor add_noise(const at::Tensor& hidden, const PackedBatch& batch);
  void refresh_pairs();
  void visit_language(const std::function<void(LanguageModel&)>& fn);
  std::vector<std::string> save_full(const std::string& dir, int64_t max_shard_size, JobContext& job) const;
  void detach();
  // Throws ERR_MARTLET_NON_FINITE naming the step, the rows and the first module whose output was not finite.
  [[noreturn]] void fail_non_finite(int64_t number, bool loss, const std::vector<MicroBatch>& micro_batches,
                                    JobContext& job);

  VisionLanguageModel& model_;
  const Family& family_;
  std::string model_dir_;
  TrainOptions options_;
  at::ScalarType dtype_;
  at::Device device_;
  TargetSelection targets_;
  Adapter adapter_;
  std::map<std::string, LoraWeights> pissa_;  // the pairs that the base weights were reduced by
  PartCounts trainable_;
  std::unique_ptr<FlatParameters> parameters_;
  std::unique_ptr<Optimizer> optimizer_;
  std::optional<FlopCounter> flops_;
  LossScaler scaler_;
  DropoutSource dropout_;
  FeatureCache* features_ = nullptr;
  int64_t step_ = 0;     // steps done, which is the position in the data
  int64_t updates_ = 0;  // of these, those that changed the weights: the position in the schedule
};

}  // namespace martlet
