// Files that are whole or not there: written under a temporary name in the same folder, synced, renamed.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>

namespace martlet {

class AtomicFile {
 public:
  // Opens `<path>.tmp-<pid>`. ERR_MARTLET_IO with the path and the remedy when that fails, as do all calls below.
  explicit AtomicFile(std::filesystem::path path);
  // Removes the temporary file unless commit() was called.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t size);
  // Any thread; does not move the place where write() goes on.
  void write_at(const void* data, size_t size, size_t offset);
  void commit();

 private:
  [[noreturn]] void fail_with_errno(const char* what) const;

  std::filesystem::path path_, temporary_;
  int fd_ = -1;
  size_t end_ = 0;  // of what write() has written
};

void write_text_file(const std::filesystem::path& path, const std::string& text);

}  // namespace martlet
