// Which of the model's own parameters a run trains, and in which groups all trained parameters fall.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/lora/adapter.h"
#include "core/train/flat_parameters.h"

namespace martlet {

// ms-swift's lists: beginnings of full parameter names, or one regular expression that is searched for in them.
// trainable wins over frozen.
struct ParameterRules {
  std::vector<std::string> trainable, frozen;
  std::string trainable_regex, frozen_regex;
  double frozen_ratio = 0;  // share of the parameters, from the first on, that is frozen
};

struct ParameterSelection {
  std::vector<std::pair<std::string, Parameter*>> parameters;
  std::vector<std::pair<std::string, std::vector<std::string>>> unmatched;  // entry → nearest names
  std::vector<std::string> modules;  // paths of those that modules_to_save or a rule chose as a whole, for PEFT
};

// Full training: all parts that are not frozen, as the rules change it. Nothing left is ERR_MARTLET_CONFIG.
ParameterSelection select_full(VisionLanguageModel& model, const FreezeFlags& freeze, const ParameterRules& rules,
                               const std::function<std::string(const std::string&)>& canonical_key);

struct SavedModuleOptions {
  std::vector<std::string> modules_to_save;  // names or endings; all-embedding, all-norm
  std::string bias = "none";                 // none | all | lora_only
  bool vision_and_projector = false;         // ms-swift's lora_llm
  bool projector = false;                    // ModelInfo::whole_projector
  ParameterRules rules;
};

// Beside LoRA pairs: what is trained as a whole. A module with a pair keeps its pair alone.
ParameterSelection select_saved(VisionLanguageModel& model, const Adapter& adapter, const SavedModuleOptions& options,
                                const std::function<std::string(const std::string&)>& canonical_key);

// Parameters that weight decay applies to: not those of LayerNorm modules nor any whose name says bias or norm
// (transformers' Trainer.get_decay_parameter_names).
bool is_decayed(const std::string& name, bool in_layer_norm);

struct RateOptions {
  double learning_rate = 1e-4, weight_decay = 0;
  std::optional<double> vit_lr, aligner_lr;
  std::optional<double> lora_plus_ratio;  // LoRA+ (Hayou et al. 2024): B and vectors learn that much faster
};

// Collects groups of equal rate and decay; PEFT's create_loraplus_optimizer decides what is fast.
class GroupBuilder {
 public:
  explicit GroupBuilder(const RateOptions& options) : options_(options) {}
  size_t group(Part part, bool decayed, bool fast);
  const std::vector<ParameterGroup>& groups() const { return groups_; }

 private:
  RateOptions options_;
  std::vector<ParameterGroup> groups_;
};

}  // namespace martlet
