#include "core/io/mapped_file.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/base/error.h"

namespace martlet {

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  std::shared_ptr<MappedFile> file(new MappedFile());
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    fail(code::kWeights, "Cannot open " + path.string() + ": " + std::strerror(errno) + ".", {{"path", path.string()}});
  }
  struct stat status;
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd);
    fail(code::kWeights, path.string() + " is not a regular file.", {{"path", path.string()}});
  }
  file->size_ = static_cast<size_t>(status.st_size);
  int error = 0;
  if (file->size_ > 0) {
    void* mapping = ::mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapping == MAP_FAILED) {
      error = errno;
    } else {
      file->mapping_ = mapping;
    }
  }
  ::close(fd);
  if (error != 0) {
    fail(code::kIo, "Cannot map " + path.string() + " into memory: " + std::strerror(error) + ".",
         {{"path", path.string()}});
  }
  return file;
}

MappedFile::~MappedFile() {
  if (mapping_ != nullptr) ::munmap(mapping_, size_);
}

at::Tensor MappedFile::tensor(size_t offset, at::IntArrayRef shape, at::ScalarType dtype) const {
  const char* begin = data() + offset;
  if (reinterpret_cast<uintptr_t>(begin) % c10::elementSize(dtype) != 0) {
    at::Tensor copy = at::empty(shape, dtype);
    // An empty tensor has no memory, and memcpy takes no null pointer.
    if (copy.numel() > 0) std::memcpy(copy.mutable_data_ptr(), begin, copy.nbytes());
    return copy;
  }
  // The mapping is private and never written to, so dropping const is safe.
  return at::from_blob(
      const_cast<char*>(begin), shape, [self = shared_from_this()](void*) {}, at::TensorOptions().dtype(dtype));
}

void MappedFile::release(size_t offset, size_t size) const {
  // Whole pages only: the first and the last may hold a neighbour.
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data() + offset) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data() + offset + size) / page * page;
  // The mapping is private and never written to, so its pages can be had from the file again.
  if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace martlet
