// Which weights of a model are quantised, and checkpoints that hold them so.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>

#include "core/base/job.h"
#include "core/io/checkpoint.h"
#include "core/models/model.h"

namespace martlet {

// Full names of the weights of the language model's linears. Vision, projector and head stay as they are.
std::set<std::string> quantizable_weights(VisionLanguageModel& model);

// A checkpoint seen without quantisation: a quantised weight is one dense tensor of the dtype it was quantised from.
class DenseCheckpoint {
 public:
  explicit DenseCheckpoint(const std::string& dir);
  // In the order of the file; parts of quantised weights are left out.
  const std::vector<std::string>& names() const { return names_; }
  // Byte ranges mean nothing for a quantised weight.
  TensorInfo info(const std::string& name) const;
  at::Tensor tensor(const std::string& name) const;
  bool is_quantized() const { return quantized_; }
  // What `dtype: auto` means: that of the embeddings.
  at::ScalarType main_dtype() const;

 private:
  at::Tensor part(const std::string& name) const;
  bool is_quantized(const std::string& name) const;

  Checkpoint checkpoint_;
  std::set<std::string> stored_;
  std::vector<std::string> names_;
  bool quantized_ = false;
};

// Writes a model quantised, tensor by tensor: arguments and result are QuantizeArgs and QuantizeResult of
// lib/native/binding.ts.
nlohmann::json quantize_checkpoint_json(const nlohmann::json& args, JobContext& job);

}  // namespace martlet
