// Weights that torch.save wrote (pytorch_model.bin): a zip of a pickle and one entry of plain bytes for each storage.
// Nothing in it is run; tensors are views of the mapped file.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/io/mapped_file.h"
#include "core/io/tensor_file.h"

namespace martlet {

class TorchFile : public TensorFile {
 public:
  // ERR_MARTLET_WEIGHTS names the path and what is wrong or refused: an opcode, a function, a tensor.
  static std::shared_ptr<TorchFile> open(const std::filesystem::path& path);
  at::Tensor tensor(const std::string& name) const override;
  void release(const std::string& name) const override;

 private:
  struct Layout {
    size_t storage_begin = 0;  // in the file
    int64_t storage_elements = 0, offset = 0;
    std::vector<int64_t> strides;
  };

  TorchFile() = default;
  void parse(const std::filesystem::path& path);

  std::shared_ptr<const MappedFile> file_;
  std::vector<Layout> layouts_;  // of tensors_
};

}  // namespace martlet
