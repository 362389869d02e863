#include "core/vision/feature_cache.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/fingerprint.h"
#include "core/io/safetensors.h"

namespace martlet {
namespace {

namespace fs = std::filesystem;
using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

std::string checksum(const Tensors& tensors) {
  Fingerprint print;
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor flat = tensor.contiguous();
    print.add(flat.const_data_ptr(), flat.nbytes());
  }
  return print.hex();
}

Tensors named(const VisionFeatures& values) {
  Tensors out = {{"tokens", values.tokens}};
  for (size_t i = 0; i < values.deepstack.size(); ++i)
    out.emplace_back("deepstack." + std::to_string(i), values.deepstack[i]);
  return out;
}

std::string grid_text(const PatchGrid& grid) {
  return std::to_string(grid.t) + " " + std::to_string(grid.h) + " " + std::to_string(grid.w);
}

PictureFeatures read_file(const fs::path& path, const std::string& key) {
  const auto file = SafetensorsFile::open(path);
  const auto& about = file->metadata();
  const auto entry = [&](const char* name) {
    const auto it = about.find(name);
    return it == about.end() ? std::string() : it->second;
  };
  PictureFeatures out;
  const std::string grid = entry("grid");
  if (entry("key") != key || std::sscanf(grid.c_str(), "%ld %ld %ld", &out.grid.t, &out.grid.h, &out.grid.w) != 3 ||
      file->find("tokens") == nullptr)
    fail(code::kIo, path.string() + " holds no features of this picture.");
  out.values.tokens = file->tensor("tokens").clone();
  for (size_t i = 0; i + 1 < file->tensors().size(); ++i) {
    const at::Tensor level = file->tensor("deepstack." + std::to_string(i));
    if (!level.defined()) fail(code::kIo, path.string() + " lacks a level.");
    out.values.deepstack.push_back(level.clone());
  }
  if (entry("checksum") != checksum(named(out.values))) fail(code::kIo, path.string() + " is damaged.");
  return out;
}

}  // namespace

FeatureCache::FeatureCache(FeatureCacheOptions options) : options_(std::move(options)) {
  if (options_.dir.empty()) return;
  options_.dir /= options_.fingerprint;
  std::error_code error;
  fs::create_directories(options_.dir, error);
  if (error) {
    fail(code::kIo, "Cannot create " + options_.dir.string() + ": " + error.message() + ".",
         {{"path", options_.dir.string()}});
  }
  std::vector<std::pair<fs::file_time_type, fs::path>> files;
  for (const auto& entry : fs::directory_iterator(options_.dir, error)) {
    if (entry.path().extension() == ".safetensors" && entry.is_regular_file(error))
      files.emplace_back(entry.last_write_time(error), entry.path());
  }
  std::sort(files.begin(), files.end());
  for (const auto& [time, path] : files) {
    const std::string key = path.stem().string();
    const size_t bytes = fs::file_size(path, error);
    if (error) continue;
    entries_[key] = {order_.insert(order_.end(), key), bytes, nullptr};
    counts_.bytes += static_cast<int64_t>(bytes);
  }
  make_room(0);
}

fs::path FeatureCache::file_of(const std::string& key) const { return options_.dir / (key + ".safetensors"); }

std::shared_ptr<const PictureFeatures> FeatureCache::find(const std::string& key) {
  const auto it = entries_.find(key);
  std::shared_ptr<const PictureFeatures> found;
  if (it != entries_.end()) {
    found = it->second.features;
    if (found == nullptr) {
      try {
        found = std::make_shared<PictureFeatures>(read_file(file_of(key), key));
        std::error_code ignored;
        fs::last_write_time(file_of(key), fs::file_time_type::clock::now(), ignored);
      } catch (const Error&) {
        remove(key);
      }
    }
    if (found != nullptr) order_.splice(order_.end(), order_, it->second.place);
  }
  ++(found == nullptr ? counts_.misses : counts_.hits);
  return found;
}

void FeatureCache::put(const std::string& key, const PatchGrid& grid, const VisionFeatures& values) {
  if (!counts_.error.empty() || entries_.count(key)) return;
  size_t bytes = 0;
  for (const auto& [name, tensor] : named(values)) bytes += tensor.nbytes();
  if (bytes > options_.max_bytes) return;
  make_room(bytes);
  // Normal tensors even where the pass is an inference: training may read them.
  const c10::InferenceMode off(false);
  const at::NoGradGuard no_grad;
  const auto to_host = [&](const at::Tensor& tensor) {
    const at::Tensor host = at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(options_.pinned));
    // Readers come behind it in the device's queue.
    host.copy_(tensor, /*non_blocking=*/options_.pinned);
    return host;
  };
  auto features = std::make_shared<PictureFeatures>();
  features->grid = grid;
  features->values.tokens = to_host(values.tokens);
  for (const at::Tensor& level : values.deepstack) features->values.deepstack.push_back(to_host(level));
  if (!options_.dir.empty()) {
    const Tensors tensors = named(features->values);
    try {
      write_safetensors(file_of(key), tensors,
                        {{"key", key}, {"grid", grid_text(grid)}, {"checksum", checksum(tensors)}});
    } catch (const Error& error) {
      counts_.error = error.what();
      return;
    }
    features = nullptr;
    std::error_code ignored;
    bytes = fs::file_size(file_of(key), ignored);
    make_room(bytes);
    if (bytes > options_.max_bytes) {
      fs::remove(file_of(key), ignored);
      return;
    }
  }
  entries_[key] = {order_.insert(order_.end(), key), bytes, features};
  counts_.bytes += static_cast<int64_t>(bytes);
}

void FeatureCache::make_room(size_t bytes) {
  while (static_cast<size_t>(counts_.bytes) + bytes > options_.max_bytes && !order_.empty())
    remove(std::string(order_.front()));
}

void FeatureCache::remove(const std::string& key) {
  const auto it = entries_.find(key);
  counts_.bytes -= static_cast<int64_t>(it->second.bytes);
  order_.erase(it->second.place);
  entries_.erase(it);
  std::error_code ignored;
  if (!options_.dir.empty()) fs::remove(file_of(key), ignored);
}

}  // namespace martlet
