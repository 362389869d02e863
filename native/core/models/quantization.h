// Which weights of a model are quantised, and checkpoints that hold them so.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/base/job.h"
#include "core/io/checkpoint.h"
#include "core/models/model.h"

namespace martlet {

// Full names of the weights of the language model's linears. Vision, projector, head and what float16 is too narrow for
// stay as they are; with fp8 so do sizes that it does not hold (Fp8Tensor::fits).
std::set<std::string> quantizable_weights(VisionLanguageModel& model, QuantizationOptions::Method method);

// Names the weights that fp8 leaves in bfloat16 because of their sizes, layers' numbers as `*`; empty if there are
// none.
std::string fp8_warning(VisionLanguageModel& model);

// What `dtype: auto` means: bfloat16 or float16 if the language model's largest tensor is stored so, else float32.
// `tensors`: canonical names.
at::ScalarType stored_dtype(const VisionLanguageModel& model,
                            const std::vector<std::pair<std::string, TensorInfo>>& tensors);

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
