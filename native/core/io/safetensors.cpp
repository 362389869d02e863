#include "core/io/safetensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "core/base/error.h"
#include "core/base/fs.h"
#include "core/base/json.h"
#include "core/io/transfer.h"

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
  file->file_ = MappedFile::open(path);
  file->parse(path);
  return file;
}

void SafetensorsFile::parse(const fs::path& path) {
  const char* bytes = file_->data();
  const size_t size = file_->size();
  if (size < 8) broken(path, "it has only " + std::to_string(size) + " bytes");
  uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i) header_size = header_size << 8 | static_cast<uint8_t>(bytes[i]);
  if (header_size > kMaxHeader || header_size > size - 8) {
    broken(path, "its header claims " + std::to_string(header_size) + " bytes, the file has " + std::to_string(size));
  }
  data_ = 8 + header_size;
  const size_t data_size = size - data_;
  const json header = parse_header(path, bytes + 8, bytes + data_);

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

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const TensorInfo* info = find(name);
  return info == nullptr ? at::Tensor() : file_->tensor(data_ + info->begin, info->shape, info->dtype);
}

void SafetensorsFile::release(const std::string& name) const {
  const TensorInfo* info = find(name);
  if (info != nullptr) file_->release(data_ + info->begin, info->nbytes());
}

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

namespace {

// One file, written at many places at once.
class Shard {
 public:
  Shard(const fs::path& path, const std::string& header) : file_(path), end_(header.size()) {
    file_.write_at(header.data(), header.size(), 0);
  }
  // Where the next tensor's bytes go.
  size_t append(size_t bytes) {
    end_ += bytes;
    return end_ - bytes;
  }
  AtomicFile& file() { return file_; }
  void hold() { ++holders_; }
  // The last one to let go commits the file.
  void let_go() {
    if (--holders_ == 0) file_.commit();
  }

 private:
  AtomicFile file_;
  size_t end_;
  std::atomic<int64_t> holders_{1};  // who adds tensors, and each block that is to be written
};

void write_block(AtomicFile& file, size_t offset, const at::Tensor& bytes, StagingBuffers& buffers) {
  if (const MappedFile* source = bytes.is_cpu() ? MappedFile::of(bytes) : nullptr) {
    const at::Tensor copy = buffers.next(bytes.nbytes(), at::kCPU);
    source->read(copy.mutable_data_ptr(), source->offset_of(bytes), copy.nbytes());
    file.write_at(copy.const_data_ptr(), copy.nbytes(), offset);
  } else if (bytes.is_cpu()) {
    file.write_at(bytes.const_data_ptr(), bytes.nbytes(), offset);
  } else {
    const at::Tensor host = buffers.next(bytes.nbytes(), bytes.device());
    host.copy_(bytes, /*non_blocking=*/true);
    buffers.wait(bytes.device());
    file.write_at(host.const_data_ptr(), host.nbytes(), offset);
  }
}

}  // namespace

struct ShardWriter::Impl {
  fs::path dir;
  ShardPlan plan;
  std::vector<std::pair<size_t, size_t>> shards;  // ranges of the plan
  std::vector<std::string> files;
  size_t next = 0, shard = 0;
  std::shared_ptr<Shard> file;
  int64_t total = 0;
  TransferPool pool{transfer_threads(), size_t{256} << 20};  // last, so that its threads end first
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
    s.file = std::make_shared<Shard>(s.dir / s.files[s.shard], header_bytes(infos, {{"format", "pt"}}));
  }
  if (tensor.numel() > 0) {
    const at::Tensor bytes = tensor.contiguous().view({-1}).view(at::kByte);
    const size_t offset = s.file->append(bytes.nbytes());
    for (size_t start = 0; start < bytes.nbytes(); start += kTransferBlock) {
      const size_t count = std::min(kTransferBlock, bytes.nbytes() - start);
      s.file->hold();
      s.pool.submit(count, [shard = s.file, offset, bytes, start, count](StagingBuffers& buffers) {
        const at::Tensor block = bytes.narrow(0, static_cast<int64_t>(start), static_cast<int64_t>(count));
        write_block(shard->file(), offset + start, block, buffers);
        shard->let_go();
      });
    }
  }
  if (++s.next == end) {
    s.file->let_go();
    s.file.reset();
    ++s.shard;
  }
}

std::vector<std::string> ShardWriter::finish() {
  Impl& s = *impl_;
  if (s.next != s.plan.size()) fail(code::kInternal, "Fewer tensors were written than planned.");
  s.pool.wait();
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
