// The directory of a zip archive whose entries are stored as they are, as torch.save writes it; zip64 included.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace martlet {

struct ZipEntry {
  std::string name;
  size_t begin = 0, size = 0;  // of its bytes in the file
};

// Entries in the order of their bytes. Every number is checked against `bytes`; `broken` is called with what is wrong
// (compressed or encrypted entries, unsafe or repeated names, entries that overlap, …) and must throw. Checksums are
// not compared: torch can be told to write none, and safetensors has none either.
std::vector<ZipEntry> read_zip_directory(std::string_view bytes, const std::function<void(const std::string&)>& broken);

}  // namespace martlet
