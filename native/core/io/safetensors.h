// safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes. Read through a memory map, every
// number in the header checked against the file before it is used.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/io/mapped_file.h"
#include "core/io/tensor_file.h"

namespace martlet {

class SafetensorsFile : public TensorFile {
 public:
  // ERR_MARTLET_WEIGHTS names the path, the tensor and what is wrong.
  static std::shared_ptr<SafetensorsFile> open(const std::filesystem::path& path);
  at::Tensor tensor(const std::string& name) const override;
  void release(const std::string& name) const override;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  SafetensorsFile() = default;
  void parse(const std::filesystem::path& path);

  std::map<std::string, std::string> metadata_;
  std::shared_ptr<const MappedFile> file_;
  size_t data_ = 0;  // where the header ends
};

void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata);

// Names, dtypes and shapes of what will be written, in order. Byte ranges are not read.
using ShardPlan = std::vector<TensorInfo>;

// Writes a model's shards one tensor at a time, on threads of its own: model.safetensors, or
// model-00001-of-0000N.safetensors with model.safetensors.index.json.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path dir, const ShardPlan& plan, int64_t max_shard_size);
  ~ShardWriter();
  // Must follow the plan's order, dtype and shape. Any device. The tensor must stay as it is until finish() has
  // returned; views of mapped files are read from those files.
  void add(const std::string& name, const at::Tensor& tensor);
  // Waits until all is written. File names written.
  std::vector<std::string> finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace martlet
