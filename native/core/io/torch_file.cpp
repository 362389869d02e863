#include "core/io/torch_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string_view>

#include "core/base/error.h"
#include "core/io/pickle.h"
#include "core/io/zip.h"

namespace martlet {
namespace {

using nlohmann::json;

constexpr size_t kMaxPickle = 32u << 20;  // a tensor takes about 150 bytes
constexpr size_t kMaxDimensions = 64;

[[noreturn]] void broken(const std::filesystem::path& path, std::string what, json details = json::object()) {
  std::replace(what.begin(), what.end(), '\0', '?');  // names from the file may hold anything
  details["path"] = path.string();
  fail(code::kWeights,
       path.string() + " cannot be read as weights: " + what +
           ". Download it again from its publisher, or take a safetensors copy.",
       details);
}

// Whether all elements of the tensor lie in its storage, none of them more than once on the whole.
bool fits(const PickledTensor& tensor, int64_t& elements) {
  const int64_t limit = tensor.storage_elements;
  if (tensor.shape.size() != tensor.strides.size() || tensor.shape.size() > kMaxDimensions) return false;
  elements = 1;
  int64_t last = tensor.offset, bound = 1;  // `bound` leaves zeros out
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    const int64_t extent = tensor.shape[i], stride = tensor.strides[i];
    if (extent < 0 || stride < 0) return false;
    if (extent != 0 && bound > (std::numeric_limits<int64_t>::max() >> 8) / extent) return false;
    bound *= std::max<int64_t>(extent, 1);
    elements *= extent;
  }
  if (tensor.offset < 0 || tensor.offset > limit || elements > limit) return false;
  if (elements == 0) return true;
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    const int64_t steps = tensor.shape[i] - 1, stride = tensor.strides[i];
    if (steps == 0) continue;
    if (stride > limit / steps) return false;
    last += steps * stride;
    if (last >= limit) return false;
  }
  return last < limit;
}

}  // namespace

std::shared_ptr<TorchFile> TorchFile::open(const std::filesystem::path& path) {
  std::shared_ptr<TorchFile> file(new TorchFile());
  file->file_ = MappedFile::open(path);
  file->parse(path);
  return file;
}

void TorchFile::parse(const std::filesystem::path& path) {
  const std::string_view bytes(file_->data(), file_->size());
  if (bytes.substr(0, 1) == "\x80") {
    broken(path, "it is a bare pickle, as torch before 1.6 wrote it; load it with torch and save it again");
  }
  const std::vector<ZipEntry> entries = read_zip_directory(bytes, [&](const std::string& what) { broken(path, what); });
  std::map<std::string, const ZipEntry*> by_name;
  const std::string root = entries.empty() ? "" : entries.front().name.substr(0, entries.front().name.find('/') + 1);
  for (const ZipEntry& entry : entries) {
    if (root.empty() || entry.name.rfind(root, 0) != 0) {
      broken(path, "its entry \"" + entry.name + "\" does not lie in the folder of the others");
    }
    by_name[entry.name.substr(root.size())] = &entry;
  }
  const auto find = [&](const std::string& name) {
    const auto it = by_name.find(name);
    return it == by_name.end() ? nullptr : it->second;
  };
  const auto contents = [&](const ZipEntry& entry) { return bytes.substr(entry.begin, entry.size); };
  const ZipEntry* pickle = find("data.pkl");
  if (pickle == nullptr) broken(path, "it holds no data.pkl, so torch.save did not write it");
  if (const ZipEntry* order = find("byteorder"); order != nullptr && contents(*order) != "little") {
    broken(path, "it was written on a big-endian machine");
  }
  if (pickle->size > kMaxPickle) broken(path, "its pickle has " + std::to_string(pickle->size) + " bytes");

  const std::vector<PickledTensor> pickled = read_pickled_tensors(
      contents(*pickle), [&](const std::string& what, const json& details) { broken(path, what, details); });
  std::vector<TensorInfo> infos;
  std::vector<Layout> layouts;
  for (const PickledTensor& tensor : pickled) {
    const json about = {{"tensor", tensor.name}};
    const std::string label = "tensor " + tensor.name + " ";
    const ZipEntry* entry = find("data/" + tensor.storage);
    if (entry == nullptr)
      broken(path, label + "lies in the storage \"" + tensor.storage + "\", which is not there", about);
    const size_t item = c10::elementSize(tensor.dtype);
    if (tensor.storage_elements < 0 || entry->size % item != 0 ||
        entry->size / item != static_cast<size_t>(tensor.storage_elements)) {
      broken(path,
             label + "lies in a storage of " + std::to_string(tensor.storage_elements) + " elements of " +
                 std::to_string(item) + " bytes, for which the file has " + std::to_string(entry->size) + " bytes",
             about);
    }
    int64_t elements = 0;
    if (!fits(tensor, elements)) {
      broken(path,
             label + "claims the shape " + json(tensor.shape).dump() + " with strides " + json(tensor.strides).dump() +
                 " from element " + std::to_string(tensor.offset) + " of a storage of " +
                 std::to_string(tensor.storage_elements),
             about);
    }
    const size_t begin = entry->begin + static_cast<size_t>(tensor.offset) * item;
    infos.push_back({tensor.name, tensor.dtype, tensor.shape, begin, begin + static_cast<size_t>(elements) * item});
    layouts.push_back({entry->begin, tensor.storage_elements, tensor.offset, tensor.strides});
  }
  std::vector<size_t> order(infos.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::tie(infos[a].begin, infos[a].name) < std::tie(infos[b].begin, infos[b].name);
  });
  for (const size_t i : order) {
    if (!index_.emplace(infos[i].name, tensors_.size()).second) {
      broken(path, "it holds the tensor " + infos[i].name + " twice", {{"tensor", infos[i].name}});
    }
    tensors_.push_back(std::move(infos[i]));
    layouts_.push_back(std::move(layouts[i]));
  }
}

at::Tensor TorchFile::tensor(const std::string& name) const {
  const auto it = index_.find(name);
  if (it == index_.end()) return at::Tensor();
  const TensorInfo& info = tensors_[it->second];
  const Layout& layout = layouts_[it->second];
  return file_->tensor(layout.storage_begin, {layout.storage_elements}, info.dtype)
      .as_strided(info.shape, layout.strides, layout.offset);
}

void TorchFile::release(const std::string& name) const {
  const TensorInfo* info = find(name);
  if (info != nullptr) file_->release(info->begin, info->nbytes());
}

}  // namespace martlet
