#include "core/train/parameter_selection.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "core/base/error.h"
#include "core/nn/norm.h"

namespace martlet {
namespace {

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }
bool ends_with(const std::string& text, const std::string& tail) {
  return text.size() >= tail.size() && text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

std::regex compiled(const std::string& pattern, const char* key) {
  try {
    return std::regex(pattern);
  } catch (const std::regex_error&) {
    fail(code::kConfig, std::string(key) + ": \"" + pattern + "\" is not a regular expression that can be read.",
         {{"path", key}});
  }
}

// One list of name beginnings with its regular expression; remembers which entries matched.
class Matcher {
 public:
  Matcher(const std::vector<std::string>& prefixes, const std::string& regex, const char* key,
          const std::function<std::string(const std::string&)>& canonical_key)
      : key_(key), regex_text_(regex) {
    // A prefix may be in another version's spelling.
    for (const std::string& prefix : prefixes) prefixes_.push_back({prefix, canonical_key(prefix), false});
    if (!regex.empty()) regex_ = compiled(regex, key);
  }

  bool matches(const std::string& name) {
    bool found = false;
    for (Entry& entry : prefixes_) {
      if (!starts_with(name, entry.given) && !starts_with(name, entry.canonical)) continue;
      entry.matched = found = true;
    }
    if (regex_ && std::regex_search(name, *regex_)) found = regex_matched_ = true;
    return found;
  }

  void report(ParameterSelection& out, const std::set<std::string>& candidates) const {
    for (const Entry& entry : prefixes_) {
      if (!entry.matched) out.unmatched.emplace_back(entry.given, nearest_names(entry.given, candidates));
    }
    if (regex_ && !regex_matched_) out.unmatched.emplace_back(regex_text_, std::vector<std::string>{});
  }

 private:
  struct Entry {
    std::string given, canonical;
    bool matched;
  };
  const char* key_;
  std::string regex_text_;
  std::vector<Entry> prefixes_;
  std::optional<std::regex> regex_;
  bool regex_matched_ = false;
};

std::set<std::string> module_names(VisionLanguageModel& model) {
  std::set<std::string> names;
  model.visit([&](const std::string& path, Module&) {
    if (!path.empty()) names.insert(path);
  });
  return names;
}

}  // namespace

ParameterSelection select_full(VisionLanguageModel& model, const FreezeFlags& freeze, const ParameterRules& rules,
                               const std::function<std::string(const std::string&)>& canonical_key) {
  ParameterSelection out;
  Matcher frozen(rules.frozen, rules.frozen_regex, "freeze_parameters", canonical_key);
  Matcher trainable(rules.trainable, rules.trainable_regex, "trainable_parameters", canonical_key);
  int64_t total = 0, seen = 0;
  model.visit_parameters([&](const std::string&, Parameter& parameter) { total += parameter.numel(); });
  const double limit = rules.frozen_ratio * static_cast<double>(total);
  model.visit_parameters([&](const std::string& name, Parameter& parameter) {
    seen += parameter.numel();
    if (parameter.fixed) return;
    const bool kept = freeze.frozen(model.part_of(name)) || frozen.matches(name) ||
                      (rules.frozen_ratio > 0 && static_cast<double>(seen) <= limit);
    if (trainable.matches(name) || !kept) out.parameters.emplace_back(name, &parameter);
  });
  const std::set<std::string> names = module_names(model);
  frozen.report(out, names);
  trainable.report(out, names);
  if (out.parameters.empty()) {
    fail(code::kConfig,
         "Nothing is left to train: freeze_vit, freeze_aligner, freeze_llm and freeze_parameters freeze every "
         "parameter, and trainable_parameters matches none.");
  }
  return out;
}

ParameterSelection select_saved(VisionLanguageModel& model, const Adapter& adapter, const SavedModuleOptions& options,
                                const std::function<std::string(const std::string&)>& canonical_key) {
  ParameterSelection out;
  std::set<std::string> chosen_modules, part_names, last_names,
      unmatched(options.modules_to_save.begin(), options.modules_to_save.end());
  Matcher trainable(options.rules.trainable, options.rules.trainable_regex, "trainable_parameters", canonical_key);
  model.visit([&](const std::string& path, Module& module) {
    if (!path.empty()) last_names.insert(path.substr(path.rfind('.') + 1));
    bool chosen = !path.empty() && options.projector && model.part_of(path) == Part::kProjector;
    for (const std::string& name : options.modules_to_save) {
      const bool matched = name == "all-embedding" ? dynamic_cast<Embedding*>(&module) != nullptr
                           : name == "all-norm"    ? dynamic_cast<LayerNorm*>(&module) != nullptr ||
                                                         dynamic_cast<RmsNorm*>(&module) != nullptr
                                                   : matches_name(path, name);
      if (!matched) continue;
      unmatched.erase(name);
      chosen = true;
    }
    // A parameter beside child modules (`proj` of a whole tower) is saved alone: PEFT loads it by its key.
    std::set<std::string> alone;
    for (const Parameter* parameter : module.own_parameters()) {
      const std::string name = join_path(path, parameter->name);
      const Part part = model.part_of(name);
      bool matched = trainable.matches(name) || (options.vision_and_projector && part != Part::kLanguage) ||
                     (options.projector && part == Part::kProjector);
      for (const std::string& wanted : options.modules_to_save) {
        if (!module.has_children() || !matches_name(name, wanted)) continue;
        unmatched.erase(wanted);
        matched = true;
      }
      if (!matched) continue;
      if (module.has_children()) {
        alone.insert(name);
      } else {
        chosen = true;
      }
    }
    // PEFT saves a module with everything in it.
    const bool inside = std::any_of(chosen_modules.begin(), chosen_modules.end(),
                                    [&](const std::string& outer) { return starts_with(path, outer + "."); });
    if (adapter.layers.count(path)) return;
    if (chosen && !inside) {
      chosen_modules.insert(path);
      out.modules.push_back(path);
    }
    for (Parameter* parameter : module.own_parameters()) {
      const std::string name = join_path(path, parameter->name);
      if (!parameter->fixed && (chosen || inside || alone.count(name))) out.parameters.emplace_back(name, parameter);
    }
  });
  if (options.bias != "none") {
    std::set<std::string> taken;
    for (const auto& [name, parameter] : out.parameters) taken.insert(name);
    model.visit([&](const std::string& path, Module& module) {
      if (options.bias == "lora_only" && !adapter.layers.count(path)) return;
      for (Parameter* parameter : module.own_parameters()) {
        const std::string name = join_path(path, parameter->name);
        if (parameter->name == "bias" && taken.insert(name).second) out.parameters.emplace_back(name, parameter);
      }
    });
  }
  for (const std::string& name : unmatched) out.unmatched.emplace_back(name, nearest_names(name, last_names));
  trainable.report(out, module_names(model));
  if (unmatched.size() == options.modules_to_save.size() && !unmatched.empty()) {
    std::string near;
    for (const std::string& name : out.unmatched.front().second) near += (near.empty() ? "" : ", ") + name;
    fail(code::kConfig,
         "modules_to_save matched no module (asked for: " + *unmatched.begin() + ", …). Near: " + near + ".",
         {{"path", "modules_to_save"}});
  }
  return out;
}

bool is_decayed(const std::string& name, bool in_layer_norm) {
  if (in_layer_norm) return false;
  std::string lower = name;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* part : {"bias", "layernorm", "rmsnorm"}) {
    if (lower.find(part) != std::string::npos) return false;
  }
  for (size_t begin = 0; begin <= lower.size();) {
    const size_t end = std::min(lower.find('.', begin), lower.size());
    const std::string component = lower.substr(begin, end - begin);
    if (component == "norm" || ends_with(component, "_norm")) return false;
    begin = end + 1;
  }
  return true;
}

size_t GroupBuilder::group(Part part, bool decayed, bool fast) {
  double rate = options_.learning_rate;
  if (part == Part::kVision) rate = options_.vit_lr.value_or(rate);
  if (part == Part::kProjector) rate = options_.aligner_lr.value_or(rate);
  if (fast) rate *= options_.lora_plus_ratio.value_or(1.0);
  const double decay = decayed ? options_.weight_decay : 0.0;
  const auto same = [&](const ParameterGroup& g) { return g.learning_rate == rate && g.weight_decay == decay; };
  const auto it = std::find_if(groups_.begin(), groups_.end(), same);
  if (it != groups_.end()) return static_cast<size_t>(it - groups_.begin());
  groups_.push_back({rate, decay});
  return groups_.size() - 1;
}

}  // namespace martlet
