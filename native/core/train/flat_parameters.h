// All trained parameters of a run in one flat float32 buffer, with their gradients and AdamW moments beside it. The
// network reads views: of the master itself in float32, of a rounded copy in 16-bit models.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace martlet {

struct TrainedParameter {
  std::string name;
  at::Tensor* slot;  // where the network reads it; holds the initial value, float32 or the compute dtype
  bool decay;        // weight decay applies (not to biases and norms, as transformers' Trainer)
};

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0.0;
};

class FlatParameters {
 public:
  // Takes the initial values, then points every slot at its view (a leaf that requires grad).
  FlatParameters(std::vector<TrainedParameter> parameters, at::ScalarType compute_dtype, at::Device device);
  // Slots keep plain values afterwards (detached copies in the compute dtype).
  ~FlatParameters();
  FlatParameters(const FlatParameters&) = delete;
  FlatParameters& operator=(const FlatParameters&) = delete;

  void zero_grad();
  // Adds the 16-bit gradients of one micro-batch to the float32 sum. Nothing to do in float32.
  void collect_micro_batch();
  at::Tensor grad_norm() const { return grad_.norm(); }
  void scale_grad(const at::Tensor& factor) { grad_.mul_(factor); }
  void adamw_step(double learning_rate, const AdamWOptions& options);

  int64_t size() const { return master_.numel(); }
  const std::vector<TrainedParameter>& parameters() const { return parameters_; }
  at::Tensor master_view(size_t i) const { return view(master_, i); }
  at::Tensor grad_view(size_t i) const { return view(grad_, i); }

  // For checkpoints: flat tensors by name. load_state checks sizes.
  std::vector<std::pair<std::string, at::Tensor>> state() const;
  void load_state(const std::vector<std::pair<std::string, at::Tensor>>& state);

 private:
  at::Tensor view(const at::Tensor& flat, size_t i) const;
  void refresh_compute();

  std::vector<TrainedParameter> parameters_;  // those with decay first
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<int64_t> offsets_;  // parameters + 1
  int64_t decayed_ = 0;           // elements with weight decay
  at::Tensor master_, grad_, exp_avg_, exp_avg_sq_, step_;
  at::Tensor compute_, compute_grad_;  // 16-bit models only
};

}  // namespace martlet
