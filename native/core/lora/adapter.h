// Adapters on a model: which linears get a pair, fresh or from a file, and which adapter is switched on.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/lora/adapter_config.h"
#include "core/lora/adapter_io.h"
#include "core/models/model.h"

namespace martlet {

struct Adapter {
  AdapterConfig config;
  std::map<std::string, LoraLayer> layers;  // by module path
};

struct FreezeFlags {
  bool vision = true, projector = true, language = false;
  bool frozen(Part part) const {
    return part == Part::kVision ? vision : part == Part::kProjector ? projector : language;
  }
};

struct TargetSelection {
  std::vector<std::pair<std::string, Linear*>> linears;
  std::vector<std::pair<std::string, std::vector<std::string>>> unmatched;  // entry → nearest module names
  std::vector<std::string> warnings;
  // What adapter_config.json says of these targets: names where PEFT's ending rule finds the same modules, else a
  // regular expression.
  std::vector<std::string> peft_names;
  std::string peft_regex;
};

// PEFT's matching: an entry is a module's path or its ending after a dot; a single string is a regular expression over
// the whole path; `all-linear` is the family's default. Frozen parts are left out, with a warning if an explicit entry
// reached into one. Nothing matched is ERR_MARTLET_CONFIG with the nearest names.
TargetSelection select_targets(VisionLanguageModel& model, const std::vector<std::string>& names,
                               const std::string& regex, const FreezeFlags& freeze);

// A: uniform(±1/√in) as PEFT's kaiming_uniform(a = √5); B: zero. float32 on the model's device.
Adapter create_adapter(const TargetSelection& targets, const AdapterConfig& config, uint64_t seed, at::Device device);

// Matrices of a PEFT folder for this model, cast to `dtype`. Pairs for modules that the model lacks are
// ERR_MARTLET_ADAPTER.
Adapter attach_adapter(VisionLanguageModel& model, AdapterWeights weights,
                       const std::function<bool(const std::string&)>& is_unused, at::ScalarType dtype,
                       at::Device device, const std::string& dir);

// Switches `adapter` on in every linear; null = the base alone.
void activate(VisionLanguageModel& model, const Adapter* adapter);

}  // namespace martlet
