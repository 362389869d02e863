#include "core/io/zip.h"

#include <algorithm>
#include <cstdint>
#include <set>

namespace martlet {
namespace {

using Broken = std::function<void(const std::string&)>;

// PKWARE's APPNOTE.TXT, section 4.3: signatures and sizes of the records without their variable parts.
constexpr uint32_t kLocalHeader = 0x04034b50, kCentralHeader = 0x02014b50, kEnd = 0x06054b50, kEnd64 = 0x06064b50,
                   kEnd64Locator = 0x07064b50;
constexpr size_t kLocalHeaderSize = 30, kCentralHeaderSize = 46, kEndSize = 22, kEnd64Size = 56, kEnd64LocatorSize = 20,
                 kMaxComment = 0xffff;
constexpr uint16_t kZip64Extra = 0x0001, kStored = 0, kEncrypted = 1;
constexpr uint64_t kIn64Bits = 0xffffffff;  // "see the zip64 record"

// Little-endian numbers, each checked against the end of the file.
class Reader {
 public:
  Reader(std::string_view bytes, const Broken& broken) : bytes_(bytes), broken_(broken) {}

  uint64_t number(uint64_t at, size_t size) const {
    need(at, size);
    uint64_t value = 0;
    for (size_t i = size; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes_[at + i]);
    return value;
  }
  uint16_t u16(uint64_t at) const { return static_cast<uint16_t>(number(at, 2)); }
  uint32_t u32(uint64_t at) const { return static_cast<uint32_t>(number(at, 4)); }
  uint64_t u64(uint64_t at) const { return number(at, 8); }
  std::string_view text(uint64_t at, size_t size) const {
    need(at, size);
    return bytes_.substr(at, size);
  }
  void need(uint64_t at, uint64_t size) const {
    if (at > bytes_.size() || size > bytes_.size() - at) broken_("a record reaches past the end of the file");
  }
  size_t size() const { return bytes_.size(); }

 private:
  std::string_view bytes_;
  const Broken& broken_;
};

struct Directory {
  uint64_t entries = 0, begin = 0, size = 0;
};

Directory find_directory(const Reader& in, const Broken& broken) {
  const size_t first = in.size() > kEndSize + kMaxComment ? in.size() - kEndSize - kMaxComment : 0;
  uint64_t end = in.size();
  for (uint64_t at = in.size() < kEndSize ? 0 : in.size() - kEndSize + 1; at-- > first;) {
    // The comment must reach to the end of the file exactly, so that no other record can pass for this one.
    if (in.u32(at) == kEnd && in.u16(at + 20) == in.size() - at - kEndSize) {
      end = at;
      break;
    }
  }
  if (end == in.size()) broken("it has no directory at its end (it is cut short, or is no zip archive)");
  if (in.u16(end + 4) != 0 || in.u16(end + 6) != 0) broken("it is one part of a divided archive");
  Directory out{in.u16(end + 10), in.u32(end + 16), in.u32(end + 12)};
  uint64_t limit = end;
  if (end >= kEnd64LocatorSize && in.u32(end - kEnd64LocatorSize) == kEnd64Locator) {
    const uint64_t end64 = in.u64(end - kEnd64LocatorSize + 8);
    in.need(end64, kEnd64Size);
    if (in.u32(end64) != kEnd64) broken("its zip64 directory is not where it says");
    out = {in.u64(end64 + 32), in.u64(end64 + 48), in.u64(end64 + 40)};
    limit = end64;
  }
  if (out.begin > limit || out.size > limit - out.begin) broken("its directory reaches past its place");
  return out;
}

// Names are never used as paths; one that tries to lead elsewhere shows that the file was made to deceive.
bool is_safe(std::string_view name) {
  if (name.empty() || name.front() == '/' || name.find('\\') != name.npos || name.find('\0') != name.npos) return false;
  for (size_t at = 0; at <= name.size();) {
    const size_t slash = std::min(name.find('/', at), name.size());
    const std::string_view part = name.substr(at, slash - at);
    if (part == "." || part == ".." || (part.empty() && slash != name.size())) return false;
    at = slash + 1;
  }
  return true;
}

}  // namespace

std::vector<ZipEntry> read_zip_directory(std::string_view bytes, const Broken& broken) {
  const Reader in(bytes, broken);
  const Directory directory = find_directory(in, broken);
  std::vector<ZipEntry> entries;
  std::vector<uint64_t> headers;
  std::set<std::string_view> names;
  uint64_t at = directory.begin;
  const uint64_t end = directory.begin + directory.size;
  for (uint64_t i = 0; i < directory.entries; ++i) {
    if (end - at < kCentralHeaderSize || in.u32(at) != kCentralHeader) {
      broken("its directory describes " + std::to_string(i) + " entries where it claims " +
             std::to_string(directory.entries));
    }
    const size_t name_size = in.u16(at + 28), extra_size = in.u16(at + 30), comment_size = in.u16(at + 32);
    const uint64_t next = at + kCentralHeaderSize + name_size + extra_size + comment_size;
    if (next > end) broken("an entry of its directory reaches past the directory");
    const std::string_view name = in.text(at + kCentralHeaderSize, name_size);
    const std::string label = "its entry \"" + std::string(name) + "\" ";
    if (!is_safe(name)) broken(label + "has an unsafe name");
    if (!names.insert(name).second) broken(label + "is there twice");
    if (in.u16(at + 8) & kEncrypted) broken(label + "is encrypted");
    if (in.u16(at + 10) != kStored) broken(label + "is compressed, which torch.save never does");

    uint64_t size = in.u32(at + 24), stored = in.u32(at + 20), header = in.u32(at + 42);
    if (size == kIn64Bits || stored == kIn64Bits || header == kIn64Bits) {
      uint64_t field = at + kCentralHeaderSize + name_size;
      const uint64_t extra_end = field + extra_size;
      while (extra_end - field >= 4 && in.u16(field) != kZip64Extra) {
        field += 4 + uint64_t{in.u16(field + 2)};
        if (field > extra_end) break;
      }
      const bool found = field <= extra_end && extra_end - field >= 4;
      const uint64_t field_end = found ? field + 4 + in.u16(field + 2) : 0;
      if (!found || field_end > extra_end) broken(label + "has no zip64 sizes");
      field += 4;
      for (uint64_t* value : {&size, &stored, &header}) {
        if (*value != kIn64Bits) continue;
        if (field_end - field < 8) broken(label + "has no zip64 sizes");
        *value = in.u64(field);
        field += 8;
      }
    }
    if (size != stored) broken(label + "claims two sizes");

    // The local header repeats the name, but may have another extra field: only it tells where the bytes begin.
    if (header > directory.begin || directory.begin - header < kLocalHeaderSize) {
      broken(label + "does not lie before the directory");
    }
    if (in.u32(header) != kLocalHeader || in.u16(header + 8) != kStored || in.u16(header + 6) & kEncrypted ||
        in.text(header + kLocalHeaderSize, in.u16(header + 26)) != name) {
      broken(label + "has a header of its own that says otherwise");
    }
    const uint64_t begin = header + kLocalHeaderSize + in.u16(header + 26) + in.u16(header + 28);
    if (begin > directory.begin || size > directory.begin - begin) {
      broken(label + "claims " + std::to_string(size) + " bytes, which the file does not have");
    }
    entries.push_back({std::string(name), begin, size});
    headers.push_back(header);
    at = next;
  }
  if (at != end) broken("its directory holds bytes that describe no entry");

  std::vector<size_t> order(entries.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return headers[a] < headers[b]; });
  std::vector<ZipEntry> sorted;
  sorted.reserve(order.size());
  for (const size_t i : order) {
    if (!sorted.empty() && headers[i] < sorted.back().begin + sorted.back().size) {
      broken("its entry \"" + entries[i].name + "\" lies over \"" + sorted.back().name + "\"");
    }
    sorted.push_back(std::move(entries[i]));
  }
  return sorted;
}

}  // namespace martlet
