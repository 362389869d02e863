#include "core/base/fs.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/base/error.h"

namespace martlet {

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  temporary_ = path_;
  temporary_ += ".tmp-" + std::to_string(::getpid());
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) fail_with_errno("create");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail_with_errno(const char* what) const {
  const int error = errno;
  const std::string remedy = error == ENOSPC || error == EDQUOT
                                 ? " The disk is full: free space or choose another output folder."
                             : error == EACCES || error == EROFS ? " Choose a folder that you may write to."
                                                                 : "";
  fail(code::kIo, std::string("Cannot ") + what + " " + path_.string() + ": " + std::strerror(error) + "." + remedy,
       {{"path", path_.string()}, {"errno", error}});
}

void AtomicFile::write(const void* data, size_t size) {
  write_at(data, size, end_);
  end_ += size;
}

void AtomicFile::write_at(const void* data, size_t size, size_t offset) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::pwrite(fd_, bytes, std::min(size, size_t{1} << 30), static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail_with_errno("write");
    }
    bytes += written;
    offset += static_cast<size_t>(written);
    size -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail_with_errno("write");
  if (::close(fd_) != 0) {
    fd_ = -1;
    ::unlink(temporary_.c_str());
    fail_with_errno("write");
  }
  fd_ = -1;
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary_.c_str());
    errno = error;
    fail_with_errno("rename");
  }
  // The rename itself must reach the disk.
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
  if (const int dir = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); dir >= 0) {
    ::fsync(dir);
    ::close(dir);
  }
}

void write_text_file(const std::filesystem::path& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace martlet
