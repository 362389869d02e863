#include "core/lora/adapter_io.h"

#include <ATen/ATen.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/fs.h"
#include "core/io/safetensors.h"

namespace martlet {
namespace {

constexpr const char* kWeightsFile = "adapter_model.safetensors";
constexpr const char* kConfigFile = "adapter_config.json";
const std::string kPrefix = "base_model.model.";
constexpr const char* kMagnitude = "lora_magnitude_vector";
constexpr const char* kBaseLayer = ".base_layer.";

}  // namespace

AdapterWeights read_adapter(const std::filesystem::path& dir,
                            const std::function<std::string(const std::string&)>& canonical_key) {
  AdapterWeights out;
  out.config = read_adapter_config(dir);
  const std::filesystem::path path = dir / kWeightsFile;
  if (!std::filesystem::exists(path)) {
    fail(code::kAdapter,
         "There is no adapter_model.safetensors in " + dir.string() +
             ". (An adapter_model.bin must be saved again by PEFT.)",
         {{"path", dir.string()}});
  }
  std::shared_ptr<SafetensorsFile> file;
  try {
    file = SafetensorsFile::open(path);
  } catch (const Error& e) {
    throw Error(code::kAdapter, e.what(), e.details_json());
  }
  const auto wrong = [&](const std::string& key, const std::string& what) {
    fail(code::kAdapter, path.string() + ": " + key + " " + what + ".", {{"path", path.string()}, {"key", key}});
  };
  for (const TensorInfo& info : file->tensors()) {
    const std::string& key = info.name;
    if (key.rfind(kPrefix, 0) != 0)
      wrong(key, "does not begin with base_model.model., so it is not a key of a PEFT adapter");
    std::string rest = key.substr(kPrefix.size());
    const size_t cut = rest.rfind(".lora_");
    if (cut == std::string::npos) {
      if (const size_t base = rest.find(kBaseLayer); base != std::string::npos)
        rest.erase(base, std::strlen(kBaseLayer) - 1);
      out.saved_modules.emplace(canonical_key(rest), file->tensor(key));
      continue;
    }
    const std::string kind = rest.substr(cut + 1);
    const bool is_magnitude = kind == kMagnitude;
    if (!is_magnitude && kind != "lora_A.weight" && kind != "lora_B.weight") {
      wrong(key, "is of a kind that is not supported (known: lora_A.weight, lora_B.weight, " + std::string(kMagnitude) +
                     ")");
    }
    if (info.shape.size() != (is_magnitude ? 1 : 2)) wrong(key, is_magnitude ? "is not a vector" : "is not a matrix");
    const std::string weight_key = canonical_key(rest.substr(0, cut) + ".weight");
    LoraWeights& pair = out.pairs[weight_key.substr(0, weight_key.size() - 7)];
    at::Tensor& slot = is_magnitude ? pair.magnitude : kind == "lora_A.weight" ? pair.a : pair.b;
    if (slot.defined()) wrong(key, "is there twice, under two spellings");
    slot = file->tensor(key);
  }
  for (const auto& [module, pair] : out.pairs) {
    if (!pair.a.defined() || !pair.b.defined()) wrong(module, "has only one half of its LoRA pair");
    if (pair.magnitude.defined() != out.config.use_dora) {
      wrong(module, out.config.use_dora ? "has no magnitudes, but adapter_config.json says use_dora"
                                        : "has magnitudes, but adapter_config.json does not say use_dora");
    }
    const int64_t rank = out.config.rank(module);
    if (pair.a.size(0) != rank || pair.b.size(1) != rank) {
      wrong(module,
            "has rank " + std::to_string(pair.a.size(0)) + " where adapter_config.json says " + std::to_string(rank));
    }
  }
  if (out.pairs.empty() && out.saved_modules.empty()) {
    fail(code::kAdapter, path.string() + " holds no LoRA weights.", {{"path", path.string()}});
  }
  return out;
}

std::vector<std::string> write_adapter(const std::filesystem::path& dir, const AdapterWeights& weights) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [module, pair] : weights.pairs) {
    tensors.emplace_back(kPrefix + module + ".lora_A.weight", pair.a);
    tensors.emplace_back(kPrefix + module + ".lora_B.weight", pair.b);
    if (pair.magnitude.defined()) tensors.emplace_back(kPrefix + module + "." + kMagnitude, pair.magnitude);
  }
  for (const auto& [key, tensor] : weights.saved_modules) {
    // PEFT wraps a module that has a pair: its own bias is base_layer.bias then.
    const size_t cut = key.rfind('.');
    const std::string module = key.substr(0, cut);
    tensors.emplace_back(kPrefix + (weights.pairs.count(module) ? module + ".base_layer" + key.substr(cut) : key),
                         tensor);
  }
  write_safetensors(dir / kWeightsFile, tensors, {{"format", "pt"}});
  write_text_file(dir / kConfigFile, adapter_config_json(weights.config));
  return {kWeightsFile, kConfigFile};
}

}  // namespace martlet
