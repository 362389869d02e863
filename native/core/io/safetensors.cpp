#include "core/io/safetensors.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "core/base/error.h"
#include "core/base/fs.h"
#include "core/base/json.h"

namespace martlet {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr size_t kMaxHeader = 100u << 20;  // as the reference implementation

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
constexpr DtypeName kDtypes[] = {
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
};

[[noreturn]] void broken(const fs::path& path, const std::string& what, json details = json::object()) {
  details["path"] = path.string();
  fail(code::kWeights, path.string() + " is not a whole safetensors file: " + what + ". Download it again.", details);
}

const char* name_of(at::ScalarType dtype) {
  for (const DtypeName& entry : kDtypes) {
    if (entry.dtype == dtype) return entry.name;
  }
  fail(code::kInternal, std::string("safetensors has no name for the dtype ") + c10::toString(dtype));
}

// Refuses a header that names a key twice: which of the two counts would be a guess.
json parse_header(const fs::path& path, const char* begin, const char* end) {
  std::vector<std::set<std::string>> keys;
  std::string repeated;
  const auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end && !keys.empty()) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.empty() && !keys.back().insert(parsed.get<std::string>()).second) {
      repeated = parsed.get<std::string>();
    }
    return true;
  };
  json header;
  try {
    header = json::parse(begin, end, watch);
  } catch (const json::parse_error& e) {
    broken(path, "its header is not JSON (byte " + std::to_string(e.byte) + ")");
  }
  if (!repeated.empty()) broken(path, "its header holds \"" + repeated + "\" twice", {{"tensor", repeated}});
  if (!header.is_object()) broken(path, "its header is not a JSON object");
  return header;
}

}  // namespace

std::shared_ptr<SafetensorsFile> SafetensorsFile::open(const fs::path& path) {
  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile());
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
  if (file->size_ >= 8) {
    file->mapping_ = ::mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file->mapping_ == MAP_FAILED) file->mapping_ = nullptr;
  }
  ::close(fd);
  if (file->size_ < 8) broken(path, "it has only " + std::to_string(file->size_) + " bytes");
  if (file->mapping_ == nullptr) {
    fail(code::kIo, "Cannot map " + path.string() + " into memory: " + std::strerror(errno) + ".",
         {{"path", path.string()}});
  }
  file->parse(path);
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (mapping_ != nullptr) ::munmap(mapping_, size_);
}

void SafetensorsFile::parse(const fs::path& path) {
  const char* bytes = static_cast<const char*>(mapping_);
  uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i) header_size = header_size << 8 | static_cast<uint8_t>(bytes[i]);
  if (header_size > kMaxHeader || header_size > size_ - 8) {
    broken(path, "its header claims " + std::to_string(header_size) + " bytes, the file has " + std::to_string(size_));
  }
  data_ = bytes + 8 + header_size;
  const size_t data_size = size_ - 8 - header_size;
  const json header = parse_header(path, bytes + 8, data_);

  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) broken(path, "__metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) broken(path, "__metadata__." + key + " is not a string");
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    const json about = {{"tensor", name}};
    const std::string label = "tensor " + name;
    if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets")) {
      broken(path, label + " has no dtype, shape and data_offsets", about);
    }
    TensorInfo info;
    info.name = name;
    const json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
    const DtypeName* known =
        std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const DtypeName& d) { return dtype == d.name; });
    if (known == std::end(kDtypes)) broken(path, label + " has the unknown dtype " + dtype.dump(), about);
    info.dtype = known->dtype;
    const uint64_t item = c10::elementSize(info.dtype);
    if (!shape.is_array()) broken(path, label + " has no shape", about);
    // `bound` leaves zeros out: strides must fit in 64 bits even where there are no elements.
    uint64_t elements = 1, bound = 1;
    for (const json& extent : shape) {
      if (!extent.is_number_unsigned())
        broken(path, label + " has a shape of other than whole numbers: " + shape.dump(), about);
      const uint64_t n = extent.get<uint64_t>();
      if (n != 0 && bound > (std::numeric_limits<int64_t>::max() >> 8) / n)
        broken(path, label + " has an impossible shape " + shape.dump(), about);
      elements *= n;
      bound *= std::max<uint64_t>(n, 1);
      info.shape.push_back(static_cast<int64_t>(n));
    }
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      broken(path, label + " has no two data_offsets", about);
    }
    info.begin = offsets[0].get<size_t>();
    info.end = offsets[1].get<size_t>();
    if (info.begin > info.end || info.end > data_size) {
      broken(path,
             label + " claims the bytes " + offsets.dump() + " of " + std::to_string(data_size) +
                 " (the file is cut short, or lies)",
             about);
    }
    if (info.nbytes() != elements * item) {
      broken(path,
             label + " has " + std::to_string(info.nbytes()) + " bytes where its shape and dtype need " +
                 std::to_string(elements * item),
             about);
    }
    tensors_.push_back(std::move(info));
  }
  std::sort(tensors_.begin(), tensors_.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  size_t expected = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorInfo& info = tensors_[i];
    if (info.begin != expected) {
      broken(
          path,
          "tensor " + info.name + (info.begin < expected ? " overlaps the one before it" : " leaves a hole before it"),
          {{"tensor", info.name}});
    }
    expected = info.end;
    index_.emplace(info.name, i);
  }
  if (expected != data_size) {
    broken(path, "it holds " + std::to_string(data_size) + " bytes of tensors where its header describes " +
                     std::to_string(expected));
  }
}

const TensorInfo* SafetensorsFile::find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

at::Tensor SafetensorsFile::tensor(const std::string& name) {
  const TensorInfo* info = find(name);
  if (info == nullptr) return at::Tensor();
  const char* begin = data_ + info->begin;
  if (reinterpret_cast<uintptr_t>(begin) % c10::elementSize(info->dtype) != 0) {
    at::Tensor copy = at::empty(info->shape, info->dtype);
    // An empty tensor has no memory, and memcpy takes no null pointer.
    if (info->nbytes() > 0) std::memcpy(copy.mutable_data_ptr(), begin, info->nbytes());
    return copy;
  }
  // The mapping is private and never written to, so dropping const is safe.
  return at::from_blob(
      const_cast<char*>(begin), info->shape, [self = shared_from_this()](void*) {},
      at::TensorOptions().dtype(info->dtype));
}

void SafetensorsFile::release(const std::string& name) const {
  const TensorInfo* info = find(name);
  if (info == nullptr) return;
  // Whole pages only: the first and the last may hold a neighbour.
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data_ + info->begin) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data_ + info->end) / page * page;
  // The mapping is private and never written to, so its pages can be had from the file again.
  if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

Checkpoint Checkpoint::open(const fs::path& dir) {
  Checkpoint checkpoint;
  const fs::path single = dir / "model.safetensors", index_path = dir / "model.safetensors.index.json";
  std::map<std::string, std::string> weight_map;
  std::vector<std::string> shard_names;
  if (fs::exists(index_path)) {
    const json index = read_json_file(index_path);
    const auto map = index.is_object() ? index.find("weight_map") : index.end();
    if (!index.is_object() || map == index.end() || !map->is_object()) {
      fail(code::kWeights, index_path.string() + " has no weight_map. Download it again.",
           {{"path", index_path.string()}});
    }
    std::set<std::string> shards;
    for (const auto& [key, shard] : map->items()) {
      // A shard is a file of this folder; a path could lead anywhere.
      if (!shard.is_string() || shard.get<std::string>().find('/') != std::string::npos ||
          shard.get<std::string>().empty() || shard == ".." || shard == ".") {
        fail(code::kWeights,
             index_path.string() + " names the file " + shard.dump() + " for " + key +
                 ", which is not a file of this folder.",
             {{"path", index_path.string()}, {"key", key}});
      }
      weight_map[key] = shard.get<std::string>();
      shards.insert(weight_map[key]);
    }
    shard_names.assign(shards.begin(), shards.end());
  } else if (fs::exists(single)) {
    shard_names = {"model.safetensors"};
  } else {
    bool pickled = false;
    std::error_code ec;
    for (const auto& entry : fs::directory_iterator(dir, ec)) {
      const std::string name = entry.path().filename().string();
      pickled = pickled || (name.rfind("pytorch_model", 0) == 0 && entry.path().extension() == ".bin");
    }
    fail(code::kWeights,
         pickled ? dir.string() +
                       " holds its weights as pytorch_model*.bin, which cannot be read yet. Convert them once with "
                       "transformers: "
                       "AutoModelForImageTextToText.from_pretrained(dir).save_pretrained(out)."
                 : dir.string() +
                       " holds neither model.safetensors nor model.safetensors.index.json: the weights are missing. "
                       "Download them.",
         {{"path", dir.string()}});
  }
  for (const std::string& shard : shard_names) {
    const fs::path path = dir / shard;
    if (!fs::exists(path)) {
      fail(code::kWeights,
           "The shard " + path.string() + " is missing (named in model.safetensors.index.json). Download it.",
           {{"path", path.string()}});
    }
    checkpoint.files_.push_back(SafetensorsFile::open(path));
    SafetensorsFile* file = checkpoint.files_.back().get();
    for (const TensorInfo& info : file->tensors()) {
      if (!weight_map.empty()) {
        const auto it = weight_map.find(info.name);
        if (it == weight_map.end() || it->second != shard) {
          fail(code::kWeights, path.string() + " holds " + info.name + ", which the index does not place there.",
               {{"path", path.string()}, {"key", info.name}});
        }
      }
      checkpoint.names_.push_back(info.name);
      checkpoint.where_[info.name] = file;
    }
  }
  for (const auto& [key, shard] : weight_map) {
    if (!checkpoint.where_.count(key)) {
      fail(code::kWeights,
           "The index places " + key + " in " + shard + ", which does not hold it. Download the shard again.",
           {{"path", (dir / shard).string()}, {"key", key}});
    }
  }
  return checkpoint;
}

const TensorInfo& Checkpoint::info(const std::string& name) const { return *where_.at(name)->find(name); }
at::Tensor Checkpoint::tensor(const std::string& name) const { return where_.at(name)->tensor(name); }
void Checkpoint::release(const std::string& name) const { where_.at(name)->release(name); }

namespace {

// The 8 bytes of length and the header, padded with spaces to a multiple of 8 so that tensors are aligned.
std::string header_bytes(const std::vector<const TensorInfo*>& tensors,
                         const std::map<std::string, std::string>& metadata) {
  json header = json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t offset = 0;
  for (const TensorInfo* info : tensors) {
    size_t size = c10::elementSize(info->dtype);
    for (const int64_t extent : info->shape) size *= static_cast<size_t>(extent);
    header[info->name] = {
        {"dtype", name_of(info->dtype)}, {"shape", info->shape}, {"data_offsets", {offset, offset + size}}};
    offset += size;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  return out + text;
}

void write_tensor(AtomicFile& file, const at::Tensor& tensor) {
  const at::Tensor flat = tensor.to(at::kCPU).contiguous();
  file.write(flat.const_data_ptr(), flat.nbytes());
}

}  // namespace

void write_safetensors(const fs::path& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorInfo> infos;
  infos.reserve(tensors.size());
  std::vector<const TensorInfo*> pointers;
  for (const auto& [name, tensor] : tensors) {
    infos.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
    pointers.push_back(&infos.back());
  }
  AtomicFile file(path);
  const std::string header = header_bytes(pointers, metadata);
  file.write(header.data(), header.size());
  for (const auto& [name, tensor] : tensors) write_tensor(file, tensor);
  file.commit();
}

struct ShardWriter::Impl {
  fs::path dir;
  ShardPlan plan;
  std::vector<std::pair<size_t, size_t>> shards;  // ranges of the plan
  std::vector<std::string> files;
  size_t next = 0, shard = 0;
  std::optional<AtomicFile> file;
  int64_t total = 0;
};

ShardWriter::ShardWriter(fs::path dir, const ShardPlan& plan, int64_t max_shard_size)
    : impl_(std::make_unique<Impl>()) {
  impl_->dir = std::move(dir);
  impl_->plan = plan;
  int64_t filled = 0;
  for (size_t i = 0; i < plan.size(); ++i) {
    int64_t size = static_cast<int64_t>(c10::elementSize(plan[i].dtype));
    for (const int64_t extent : plan[i].shape) size *= extent;
    impl_->total += size;
    if (impl_->shards.empty() || (filled > 0 && filled + size > max_shard_size)) {
      impl_->shards.emplace_back(i, i);
      filled = 0;
    }
    filled += size;
    impl_->shards.back().second = i + 1;
  }
  const size_t count = impl_->shards.size();
  for (size_t i = 0; i < count; ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, count);
    impl_->files.push_back(count == 1 ? "model.safetensors" : name);
  }
}

ShardWriter::~ShardWriter() = default;

void ShardWriter::add(const std::string& name, const at::Tensor& tensor) {
  Impl& s = *impl_;
  if (s.next >= s.plan.size()) fail(code::kInternal, "More tensors were written than planned.");
  const TensorInfo& planned = s.plan[s.next];
  if (planned.name != name || planned.dtype != tensor.scalar_type() ||
      tensor.sizes() != at::IntArrayRef(planned.shape)) {
    fail(code::kInternal, "The tensor " + name + " does not follow the plan of the shards.");
  }
  const auto [begin, end] = s.shards[s.shard];
  if (s.next == begin) {
    std::vector<const TensorInfo*> infos;
    for (size_t i = begin; i < end; ++i) infos.push_back(&s.plan[i]);
    s.file.emplace(s.dir / s.files[s.shard]);
    const std::string header = header_bytes(infos, {{"format", "pt"}});
    s.file->write(header.data(), header.size());
  }
  write_tensor(*s.file, tensor);
  if (++s.next == end) {
    s.file->commit();
    s.file.reset();
    ++s.shard;
  }
}

std::vector<std::string> ShardWriter::finish() {
  Impl& s = *impl_;
  if (s.next != s.plan.size()) fail(code::kInternal, "Fewer tensors were written than planned.");
  if (s.files.size() > 1) {
    json map = json::object();
    for (size_t shard = 0; shard < s.shards.size(); ++shard) {
      for (size_t i = s.shards[shard].first; i < s.shards[shard].second; ++i) map[s.plan[i].name] = s.files[shard];
    }
    write_text_file(s.dir / "model.safetensors.index.json",
                    json{{"metadata", {{"total_size", s.total}}}, {"weight_map", map}}.dump(2) + "\n");
  }
  return s.files;
}

}  // namespace martlet
