// A file of named tensors, whatever its format.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <string>
#include <unordered_map>
#include <vector>

namespace martlet {

struct TensorInfo {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  size_t begin = 0, end = 0;  // bytes from the first one of the file's data

  size_t nbytes() const { return end - begin; }
};

class TensorFile {
 public:
  virtual ~TensorFile() = default;

  const std::vector<TensorInfo>& tensors() const { return tensors_; }  // in the order of their bytes
  const TensorInfo* find(const std::string& name) const {
    const auto it = index_.find(name);
    return it == index_.end() ? nullptr : &tensors_[it->second];
  }
  // A view of the mapped file that keeps it alive; read only. Undefined if there is no such tensor.
  virtual at::Tensor tensor(const std::string& name) const = 0;
  // Lets go of the pages that reading the tensor brought into memory; reading it again brings them back.
  virtual void release(const std::string& name) const = 0;

 protected:
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, size_t> index_;
};

}  // namespace martlet
