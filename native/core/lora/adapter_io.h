// A PEFT adapter folder: adapter_config.json and adapter_model.safetensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/lora/adapter_config.h"

namespace martlet {

struct LoraWeights {
  at::Tensor a;          // [r, in]
  at::Tensor b;          // [out, r]
  at::Tensor magnitude;  // [out], DoRA only
};

struct AdapterWeights {
  AdapterConfig config;
  // By canonical module path, as stored (views of the file while it is open).
  std::map<std::string, LoraWeights> pairs;
  // modules_to_save and trained biases: whole tensors by canonical key.
  std::map<std::string, at::Tensor> saved_modules;
};

// `canonical_key` maps any known spelling of a weight key. Half a pair, a missing magnitude, a rank that disagrees with
// the config or a key of no known form is ERR_MARTLET_ADAPTER.
AdapterWeights read_adapter(const std::filesystem::path& dir,
                            const std::function<std::string(const std::string&)>& canonical_key);

// Each file whole or not at all; the weights first. Gives the names written.
std::vector<std::string> write_adapter(const std::filesystem::path& dir, const AdapterWeights& weights);

}  // namespace martlet
