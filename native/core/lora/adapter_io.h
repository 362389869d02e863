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

struct AdapterWeights {
  AdapterConfig config;
  // By canonical module path: A [r, in], B [out, r], as stored (views of the file while it is open).
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> pairs;
  // modules_to_save: whole tensors by canonical key.
  std::map<std::string, at::Tensor> saved_modules;
};

// `canonical_key` maps any known spelling of a weight key. Half a pair, a rank that disagrees with the config or a key
// of no known form is ERR_MARTLET_ADAPTER.
AdapterWeights read_adapter(const std::filesystem::path& dir,
                            const std::function<std::string(const std::string&)>& canonical_key);

// Each file whole or not at all; the weights first. Gives the names written.
std::vector<std::string> write_adapter(const std::filesystem::path& dir, const AdapterWeights& weights);

}  // namespace martlet
