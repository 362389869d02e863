// The weights of a model folder: safetensors, or the pickles that torch.save wrote (pytorch_model*.bin).
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/base/job.h"
#include "core/io/tensor_file.h"

namespace martlet {

class Checkpoint {
 public:
  // The first that is there of model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json,
  // pytorch_model.bin.
  static Checkpoint open(const std::filesystem::path& dir);
  // Shard by shard, in the order of their bytes.
  const std::vector<std::string>& names() const { return names_; }
  const TensorInfo& info(const std::string& name) const;
  at::Tensor tensor(const std::string& name) const;
  void release(const std::string& name) const;

 private:
  std::vector<std::shared_ptr<TensorFile>> files_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, TensorFile*> where_;
};

// The method `convert` of lib/native/binding.ts: the weights of one folder as safetensors in another.
nlohmann::json convert_checkpoint_json(const nlohmann::json& args, JobContext& job);

}  // namespace martlet
