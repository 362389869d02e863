#include "core/io/checkpoint.h"

#include <ATen/ATen.h>

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/io/safetensors.h"
#include "core/io/torch_file.h"

namespace martlet {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// In the order of preference.
constexpr const char* kSingleFiles[] = {"model.safetensors", "pytorch_model.bin"};

std::shared_ptr<TensorFile> open_shard(const fs::path& path) {
  if (path.extension() == ".bin") return TorchFile::open(path);
  return SafetensorsFile::open(path);
}

// Tensor → shard.
std::map<std::string, std::string> read_weight_map(const fs::path& path) {
  const json index = read_json_file(path);
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || map == index.end() || !map->is_object()) {
    fail(code::kWeights, path.string() + " has no weight_map. Download it again.", {{"path", path.string()}});
  }
  std::map<std::string, std::string> out;
  for (const auto& [key, shard] : map->items()) {
    // A shard is a file of this folder; a path could lead anywhere.
    if (!shard.is_string() || shard.get<std::string>().find('/') != std::string::npos ||
        shard.get<std::string>().empty() || shard == ".." || shard == ".") {
      fail(code::kWeights,
           path.string() + " names the file " + shard.dump() + " for " + key + ", which is not a file of this folder.",
           {{"path", path.string()}, {"key", key}});
    }
    out[key] = shard.get<std::string>();
  }
  return out;
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& dir) {
  Checkpoint checkpoint;
  std::map<std::string, std::string> weight_map;
  std::string index_name;
  std::set<std::string> shards;
  for (const char* single : kSingleFiles) {
    index_name = std::string(single) + ".index.json";
    if (fs::exists(dir / index_name)) {
      weight_map = read_weight_map(dir / index_name);
      for (const auto& [key, shard] : weight_map) shards.insert(shard);
      break;
    }
    if (fs::exists(dir / single)) {
      shards = {single};
      break;
    }
  }
  if (shards.empty()) {
    fail(code::kWeights,
         dir.string() + " holds neither model.safetensors nor pytorch_model.bin nor the .index.json of either: the " +
             "weights are missing. Download them.",
         {{"path", dir.string()}});
  }
  for (const std::string& shard : shards) {
    const fs::path path = dir / shard;
    if (!fs::exists(path)) {
      fail(code::kWeights, "The shard " + path.string() + " is missing (named in " + index_name + "). Download it.",
           {{"path", path.string()}});
    }
    checkpoint.files_.push_back(open_shard(path));
    TensorFile* file = checkpoint.files_.back().get();
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

json convert_checkpoint_json(const json& args, JobContext& job) {
  const Checkpoint base = Checkpoint::open(args.at("modelDir").get<std::string>());
  std::optional<at::ScalarType> dtype;
  if (args.contains("dtype")) dtype = parse_dtype(args["dtype"].get<std::string>());
  ShardPlan plan;
  for (const std::string& name : base.names()) {
    TensorInfo info = base.info(name);
    if (dtype && at::isFloatingType(info.dtype)) info.dtype = *dtype;
    plan.push_back(std::move(info));
  }
  ShardWriter writer(args.at("outputDir").get<std::string>(), plan, args.at("maxShardSize").get<int64_t>());
  int64_t done = 0;
  for (const TensorInfo& info : plan) {
    job.check();
    writer.add(info.name, base.tensor(info.name).to(info.dtype));
    job.emit(json{{"type", "convert"}, {"done", ++done}, {"total", plan.size()}}.dump());
  }
  return {{"shards", writer.finish()}, {"tensors", plan.size()}};
}

}  // namespace martlet
