// safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes. Read through a memory map, every
// number in the header checked against the file before it is used.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace martlet {

struct TensorInfo {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  size_t begin = 0, end = 0;  // bytes from the end of the header

  size_t nbytes() const { return end - begin; }
};

class SafetensorsFile : public std::enable_shared_from_this<SafetensorsFile> {
 public:
  // ERR_MARTLET_WEIGHTS names the path, the tensor and what is wrong.
  static std::shared_ptr<SafetensorsFile> open(const std::filesystem::path& path);
  ~SafetensorsFile();

  const std::vector<TensorInfo>& tensors() const { return tensors_; }  // in the order of their bytes
  const TensorInfo* find(const std::string& name) const;
  // A view of the mapping that keeps it alive; read only. Undefined if there is no such tensor.
  at::Tensor tensor(const std::string& name);
  // Lets go of the pages that reading the tensor brought into memory; reading it again brings them back.
  void release(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  SafetensorsFile() = default;
  void parse(const std::filesystem::path& path);

  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, size_t> index_;
  std::map<std::string, std::string> metadata_;
  void* mapping_ = nullptr;
  size_t size_ = 0;
  const char* data_ = nullptr;
};

// The weights of a model folder: model.safetensors, or the shards of model.safetensors.index.json.
class Checkpoint {
 public:
  static Checkpoint open(const std::filesystem::path& dir);
  // Shard by shard, in the order of their bytes.
  const std::vector<std::string>& names() const { return names_; }
  const TensorInfo& info(const std::string& name) const;
  at::Tensor tensor(const std::string& name) const;
  void release(const std::string& name) const;

 private:
  std::vector<std::shared_ptr<SafetensorsFile>> files_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, SafetensorsFile*> where_;
};

void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata);

// Names, dtypes and shapes of what will be written, in order. Byte ranges are not read.
using ShardPlan = std::vector<TensorInfo>;

// Writes a model's shards one tensor at a time: model.safetensors, or model-00001-of-0000N.safetensors with
// model.safetensors.index.json.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path dir, const ShardPlan& plan, int64_t max_shard_size);
  ~ShardWriter();
  // Must follow the plan's order, dtype and shape.
  void add(const std::string& name, const at::Tensor& tensor);
  // File names written.
  std::vector<std::string> finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace martlet
