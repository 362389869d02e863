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
  file->path_ = path;
  file->fd_ = fd;
  file->size_ = static_cast<size_t>(status.st_size);
  if (file->size_ > 0) {
    void* mapping = ::mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapping == MAP_FAILED) {
      fail(code::kIo, "Cannot map " + path.string() + " into memory: " + std::strerror(errno) + ".",
           {{"path", path.string()}});
    }
    file->mapping_ = mapping;
  }
  return file;
}

MappedFile::~MappedFile() {
  if (mapping_ != nullptr) ::munmap(mapping_, size_);
  if (fd_ >= 0) ::close(fd_);
}

namespace {

using Owner = std::shared_ptr<const MappedFile>;
void release_owner(void* owner) { delete static_cast<Owner*>(owner); }

}  // namespace

at::Tensor MappedFile::tensor(size_t offset, at::IntArrayRef shape, at::ScalarType dtype) const {
  const char* begin = data() + offset;
  if (reinterpret_cast<uintptr_t>(begin) % c10::elementSize(dtype) != 0) {
    at::Tensor copy = at::empty(shape, dtype);
    read(copy.mutable_data_ptr(), offset, copy.nbytes());
    return copy;
  }
  // The mapping is private and never written to, so dropping const is safe.
  return at::for_blob(const_cast<char*>(begin), shape)
      .context(new Owner(shared_from_this()), release_owner)
      .options(at::TensorOptions().dtype(dtype))
      .make_tensor();
}

const MappedFile* MappedFile::of(const at::Tensor& tensor) {
  const c10::DataPtr& data = tensor.storage().data_ptr();
  return data.get_deleter() == release_owner ? static_cast<Owner*>(data.get_context())->get() : nullptr;
}

size_t MappedFile::offset_of(const at::Tensor& tensor) const {
  return static_cast<size_t>(static_cast<const char*>(tensor.const_data_ptr()) - data());
}

void MappedFile::read(void* target, size_t offset, size_t size) const {
  char* bytes = static_cast<char*>(target);
  while (size > 0) {
    const ssize_t count = ::pread(fd_, bytes, size, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      fail(code::kIo,
           "Cannot read " + path_.string() + ": " +
               (count < 0 ? std::strerror(errno) : "it became shorter while it was read") + ".",
           {{"path", path_.string()}});
    }
    bytes += count;
    offset += static_cast<size_t>(count);
    size -= static_cast<size_t>(count);
  }
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
