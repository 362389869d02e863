// A whole regular file in memory, read only.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <memory>

namespace martlet {

class MappedFile : public std::enable_shared_from_this<MappedFile> {
 public:
  // ERR_MARTLET_WEIGHTS with the path when it cannot be opened or is no regular file.
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return static_cast<const char*>(mapping_); }  // null when the file is empty
  size_t size() const { return size_; }
  // The caller has checked that the bytes are there. A view that keeps the mapping alive; a copy where `offset` does
  // not suit the dtype.
  at::Tensor tensor(size_t offset, at::IntArrayRef shape, at::ScalarType dtype) const;
  // Lets go of these bytes' pages in memory; reading them again brings them back from the file.
  void release(size_t offset, size_t size) const;

 private:
  MappedFile() = default;

  void* mapping_ = nullptr;
  size_t size_ = 0;
};

}  // namespace martlet
