// A whole regular file in memory, read only. Large amounts are better read() from it: a fault for each page costs more
// than the copy, above all in virtual machines.
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
  // The file that the tensor is a view of, or views of that view are; null for any other. It lives as long as the
  // tensor's storage.
  static const MappedFile* of(const at::Tensor& tensor);
  // Of the first byte of such a tensor.
  size_t offset_of(const at::Tensor& tensor) const;
  // Bytes of the file, without the mapping. Any thread.
  void read(void* target, size_t offset, size_t size) const;
  // Lets go of these bytes' pages in memory; reading them again brings them back from the file.
  void release(size_t offset, size_t size) const;

 private:
  MappedFile() = default;

  std::filesystem::path path_;
  int fd_ = -1;
  void* mapping_ = nullptr;
  size_t size_ = 0;
};

}  // namespace martlet
