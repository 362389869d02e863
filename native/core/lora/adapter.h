// Adapters on a model: which linears get a pair, fresh or from a file, and which adapter is switched on.
#pragma once

#include <deque>
#include <map>
#include <set>
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
  // Parameters that stand in place of the model's own (modules_to_save, biases), by full name.
  std::map<std::string, at::Tensor> saved;

  int64_t numel() const;
};

struct FreezeFlags {
  bool vision = true, projector = true, language = false;
  bool frozen(Part part) const {
    return part == Part::kVision ? vision : part == Part::kProjector ? projector : language;
  }
};

// As messages call a part, and the key of the config that freezes it.
const char* part_name(Part part);
const char* freeze_flag(Part part);

struct TargetSelection {
  std::vector<std::pair<std::string, Linear*>> linears;
  std::vector<std::pair<std::string, std::vector<std::string>>> unmatched;  // entry → nearest module names
  std::vector<std::string> warnings;
  // What adapter_config.json says of these targets: names where PEFT's ending rule finds the same modules, else a
  // regular expression.
  std::vector<std::string> peft_names;
  std::string peft_regex;
  // Endings of those paths of `absent` that they match too.
  std::vector<std::string> peft_excluded;
};

// PEFT's matching: an entry is a module's path or its ending after a dot; a single string is a regular expression over
// the whole path; `all-linear` is the family's default. Frozen parts are left out, with a warning if an explicit entry
// reached into one; so are the modules of `modules_to_save`, with all in them, as PEFT's check_target_module_exists
// does. Nothing matched is ERR_MARTLET_CONFIG with the nearest names. `absent`: paths of linears that the original
// model has and this one never needs.
TargetSelection select_targets(VisionLanguageModel& model, const std::vector<std::string>& names,
                               const std::string& regex, const FreezeFlags& freeze,
                               const std::vector<std::string>& absent = {},
                               const std::vector<std::string>& modules_to_save = {});

// How fresh pairs begin (PEFT's init_lora_weights).
struct LoraInit {
  enum class Type {
    kDefault,   // A: uniform(±1/√in), PEFT's kaiming_uniform(a = √5); B: zero
    kGaussian,  // A: normal(0, 1/r); B: zero
    kRandom,    // `false`: B: uniform(±1/√r) too, so that the pair is not the identity at first
    kPissa,     // principal singular vectors of W; the base keeps the rest (Meng et al. 2024)
  };
  Type type = Type::kDefault;
  int64_t pissa_iterations = -1;  // pissa_niter_N: randomised decomposition with N iterations; −1 = exact

  // true | false | gaussian | pissa | pissa_niter_N; anything else is ERR_MARTLET_CONFIG.
  static LoraInit parse(const std::string& name);
};

// Fresh pairs, float32 on the model's device. PiSSA leaves the base weights as they are: subtract_pairs() is next.
Adapter create_adapter(const TargetSelection& targets, const AdapterConfig& config, const LoraInit& init, uint64_t seed,
                       at::Device device);

// W − scaling · B A for every pair, W being what `original` gives by the parameter's full name.
void subtract_pairs(VisionLanguageModel& model, const Adapter& adapter,
                    const std::function<at::Tensor(const std::string& name)>& original);

// Every linear but the head, by module path.
std::map<std::string, Linear*> linears_of(VisionLanguageModel& model);

// The three candidates nearest to a name that matches nothing.
std::vector<std::string> nearest_names(const std::string& name, const std::set<std::string>& candidates);
// Whether an entry other than all-linear, or the regular expression, means the module.
bool is_named_target(const std::string& path, const std::vector<std::string>& names, const std::string& regex);
// PEFT's ending rule: `path` is `name`, or ends with it after a dot.
bool matches_name(const std::string& path, const std::string& name);

// Weights of a PEFT folder for this model, cast to `dtype`. Those of modules that the model lacks are
// ERR_MARTLET_ADAPTER.
Adapter attach_adapter(VisionLanguageModel& model, AdapterWeights weights,
                       const std::function<bool(const std::string&)>& is_unused, at::ScalarType dtype,
                       at::Device device, const std::string& dir);

// Switches `adapter` on: its pairs in their linears, its parameters in place of the model's own. null = the base alone.
void activate(VisionLanguageModel& model, const Adapter* adapter);

}  // namespace martlet
