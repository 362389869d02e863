// All trained parameters of a run in one flat float32 buffer with their gradients beside it. The network reads views:
// of the master itself where it computes in float32, of a rounded copy where it computes in 16 bits.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

namespace martlet {

// Parameters that share a learning rate and a weight decay.
struct ParameterGroup {
  double learning_rate = 0;  // the base rate, which the schedule multiplies
  double weight_decay = 0;
};

struct TrainedParameter {
  std::string name;
  at::Tensor* slot;  // where the network reads it; holds the initial value
  size_t group = 0;
  at::ScalarType dtype = at::kFloat;  // that the network computes in
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

class FlatParameters {
 public:
  // Takes the initial values, then points every slot at its view (a leaf that requires grad).
  FlatParameters(std::vector<TrainedParameter> parameters, std::vector<ParameterGroup> groups, at::Device device);
  // Slots keep plain values afterwards (detached copies in the dtype of the network).
  ~FlatParameters();
  FlatParameters(const FlatParameters&) = delete;
  FlatParameters& operator=(const FlatParameters&) = delete;

  void zero_grad();
  // Adds the 16-bit gradients of one micro-batch to the float32 sum. Nothing to do in float32.
  void collect_micro_batch();
  at::Tensor grad_norm() const { return grad_.norm(); }
  void scale_grad(const at::Tensor& factor) { grad_.mul_(factor); }
  // Rounds the master into what the network reads; call after the master has changed.
  void refresh_compute();

  int64_t size() const { return master_.numel(); }
  // Sorted by dtype and group.
  const std::vector<TrainedParameter>& parameters() const { return parameters_; }
  const std::vector<ParameterGroup>& groups() const { return groups_; }
  at::Tensor master_view(size_t i) const { return view(master_, i); }
  at::Tensor grad_view(size_t i) const { return view(grad_, i); }
  const at::Tensor& master() const { return master_; }
  const at::Tensor& grad() const { return grad_; }

  // Consecutive elements of one group.
  struct Range {
    int64_t begin, end;
    size_t group;
  };
  const std::vector<Range>& ranges() const { return ranges_; }

 private:
  // What the network reads in one 16-bit dtype: elements [begin, end) of the master.
  struct Rounded {
    int64_t begin, end;
    at::Tensor values, grads;
  };
  at::Tensor view(const at::Tensor& flat, size_t i, int64_t origin = 0) const;

  std::vector<TrainedParameter> parameters_;
  std::vector<ParameterGroup> groups_;
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<int64_t> offsets_;  // parameters + 1
  std::vector<Range> ranges_;
  at::Tensor master_, grad_;
  std::vector<Rounded> rounded_;
};

// Copies `stored` into the tensors of the same names and sizes; another set of names or sizes is ERR_MARTLET_IO.
void copy_state(const NamedTensors& own, const NamedTensors& stored);

}  // namespace martlet
