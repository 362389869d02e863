#include "core/lora/adapter.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "core/base/error.h"
#include "core/base/rng.h"

namespace martlet {
namespace {

const char* part_name(Part part) {
  return part == Part::kVision ? "vision tower" : part == Part::kProjector ? "projector" : "language model";
}
const char* freeze_flag(Part part) {
  return part == Part::kVision ? "freeze_vit" : part == Part::kProjector ? "freeze_aligner" : "freeze_llm";
}

bool matches_name(const std::string& path, const std::string& name) {
  if (path == name) return true;
  const std::string tail = "." + name;
  return path.size() > tail.size() && path.compare(path.size() - tail.size(), tail.size(), tail) == 0;
}

// Levenshtein distance, for "did you mean".
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

std::vector<std::string> nearest_names(const std::string& name, const std::set<std::string>& candidates) {
  std::vector<std::pair<size_t, std::string>> ranked;
  for (const std::string& candidate : candidates) ranked.emplace_back(edit_distance(name, candidate), candidate);
  std::sort(ranked.begin(), ranked.end());
  std::vector<std::string> out;
  for (size_t i = 0; i < ranked.size() && i < 3; ++i) out.push_back(ranked[i].second);
  return out;
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

// Fills peft_names or peft_regex. A bare `q_proj` would make PEFT put pairs into a vision tower that has modules of
// that name too. `all`: paths of all modules, since PEFT takes convolutions and embeddings as well, and stops at a
// block named `0`.
void describe_for_peft(TargetSelection& selection, const std::vector<std::string>& all) {
  std::set<std::string> chosen, names;
  for (const auto& [path, linear] : selection.linears) {
    chosen.insert(path);
    names.insert(path.substr(path.rfind('.') + 1));
  }
  const auto same_set = [&](const std::function<bool(const std::string&)>& matches) {
    return std::all_of(all.begin(), all.end(),
                       [&](const std::string& path) { return matches(path) == (chosen.count(path) > 0); });
  };
  const std::vector<std::string> list(names.begin(), names.end());
  if (same_set([&](const std::string& path) { return names.count(path.substr(path.rfind('.') + 1)) > 0; })) {
    selection.peft_names = list;
    return;
  }
  // The path that all chosen modules share, up to the numbered layers: `model.language_model.layers.0…` →
  // `language_model`. Its last name holds in the module paths of every transformers version; what stands before it does
  // not.
  std::string prefix = *chosen.begin();
  for (const std::string& path : chosen) {
    size_t same = 0;
    while (same < prefix.size() && same < path.size() && prefix[same] == path[same]) ++same;
    prefix.resize(same);
  }
  prefix = prefix.substr(0, prefix.find_last_of('.') == std::string::npos ? 0 : prefix.find_last_of('.'));
  if (const size_t layers = prefix.find(".layers"); layers != std::string::npos) prefix.resize(layers);
  const std::string part = prefix.substr(prefix.rfind('.') + 1);
  std::string alternatives;
  for (const std::string& name : list) alternatives += (alternatives.empty() ? "" : "|") + name;
  const std::string regex = "(?:.*\\.)?" + part + "\\.(?:.*\\.)?(?:" + alternatives + ")";
  const std::regex compiled(regex);
  if (!part.empty() && same_set([&](const std::string& path) { return std::regex_match(path, compiled); })) {
    selection.peft_regex = regex;
  } else {
    selection.peft_names.assign(chosen.begin(), chosen.end());
  }
}

}  // namespace

TargetSelection select_targets(VisionLanguageModel& model, const std::vector<std::string>& names,
                               const std::string& regex, const FreezeFlags& freeze) {
  std::vector<std::pair<std::string, Linear*>> linears;
  std::vector<std::string> all;
  std::set<std::string> last_names;
  model.visit([&](const std::string& path, Module& module) {
    all.push_back(path);
    auto* linear = dynamic_cast<Linear*>(&module);
    if (linear == nullptr || path == "lm_head") return;
    linears.emplace_back(path, linear);
    last_names.insert(path.substr(path.rfind('.') + 1));
  });

  std::regex pattern;
  if (!regex.empty()) {
    try {
      pattern = std::regex(regex);
    } catch (const std::regex_error&) {
      fail(code::kConfig, "target_modules: \"" + regex + "\" is not a regular expression that can be read.",
           {{"path", "target_modules"}});
    }
  }

  TargetSelection out;
  std::set<std::string> matched_names;
  std::set<Part> refused;
  for (const auto& [path, linear] : linears) {
    const Part part = model.part_of(path);
    bool chosen = !regex.empty() && std::regex_match(path, pattern);
    bool explicit_choice = chosen;
    for (const std::string& name : names) {
      if (name == "all-linear") {
        // The language model, and the other parts as far as they are thawed (ms-swift).
        matched_names.insert(name);
        chosen = chosen || !freeze.frozen(part);
      } else if (matches_name(path, name)) {
        matched_names.insert(name);
        chosen = explicit_choice = true;
      }
    }
    if (!chosen) continue;
    if (freeze.frozen(part)) {
      if (explicit_choice) refused.insert(part);
      continue;
    }
    out.linears.emplace_back(path, linear);
  }
  for (const Part part : refused) {
    out.warnings.push_back(std::string("target_modules also match modules of the ") + part_name(part) +
                           ", which stays frozen because " + freeze_flag(part) + " is true; set " + freeze_flag(part) +
                           ": false to train them.");
  }
  for (const std::string& name : names) {
    if (!matched_names.count(name)) out.unmatched.emplace_back(name, nearest_names(name, last_names));
  }
  if (out.linears.empty()) {
    const std::string asked = regex.empty() ? joined(names) : regex;
    const std::vector<std::string> known(last_names.begin(), last_names.end());
    fail(code::kConfig,
         "target_modules matched no module that may be trained (asked for: " + asked +
             "). The model's linear modules are: " + joined(known) +
             (refused.empty()
                  ? "."
                  : "; the modules that did match are in a frozen part (see freeze_vit, freeze_aligner, freeze_llm)."),
         {{"path", "target_modules"}, {"asked", asked}, {"known", known}});
  }
  describe_for_peft(out, all);
  return out;
}

Adapter create_adapter(const TargetSelection& targets, const AdapterConfig& config, uint64_t seed, at::Device device) {
  Adapter adapter;
  adapter.config = config;
  int64_t index = 0;
  for (const auto& [path, linear] : targets.linears) {
    LoraLayer layer;
    // One generator a module, so that the values of a layer do not depend on which other layers are trained.
    at::Generator generator = make_generator(at::kCPU);
    generator.set_current_seed(mix_seed(seed, std::hash<std::string>{}(path)));
    const double bound = 1.0 / std::sqrt(static_cast<double>(linear->in_features()));
    layer.a = at::empty({config.r, linear->in_features()}, at::kFloat).uniform_(-bound, bound, generator).to(device);
    layer.b = at::zeros({linear->out_features(), config.r}, at::TensorOptions().dtype(at::kFloat).device(device));
    layer.scaling = config.scaling(path);
    layer.dropout = config.lora_dropout;
    layer.index = index++;
    adapter.layers.emplace(path, std::move(layer));
  }
  adapter.config.target_modules = targets.peft_names;
  adapter.config.target_regex = targets.peft_regex;
  return adapter;
}

Adapter attach_adapter(VisionLanguageModel& model, AdapterWeights weights,
                       const std::function<bool(const std::string&)>& is_unused, at::ScalarType dtype,
                       at::Device device, const std::string& dir) {
  std::map<std::string, Linear*> linears;
  model.visit([&](const std::string& path, Module& module) {
    if (auto* linear = dynamic_cast<Linear*>(&module); linear != nullptr && path != "lm_head")
      linears.emplace(path, linear);
  });
  if (!weights.saved_modules.empty()) {
    fail(code::kAdapter,
         "The adapter in " + dir +
             " holds fully trained modules (modules_to_save: " + weights.saved_modules.begin()->first +
             ", …), which are not supported yet. Merge it with PEFT and load the merged model.",
         {{"path", dir}});
  }
  Adapter adapter;
  std::vector<std::string> unknown;
  int64_t index = 0;
  for (auto& [path, pair] : weights.pairs) {
    const auto it = linears.find(path);
    if (it == linears.end()) {
      if (!is_unused(path + ".weight")) unknown.push_back(path);
      continue;
    }
    const Linear& linear = *it->second;
    if (pair.first.size(1) != linear.in_features() || pair.second.size(0) != linear.out_features()) {
      fail(code::kAdapter,
           "The adapter in " + dir + " is for another model: " + path + " is " + std::to_string(linear.out_features()) +
               "×" + std::to_string(linear.in_features()) + " here, the adapter's is " +
               std::to_string(pair.second.size(0)) + "×" + std::to_string(pair.first.size(1)) + ".",
           {{"path", dir}, {"module", path}});
    }
    LoraLayer layer;
    layer.a = pair.first.to(device, dtype);
    layer.b = pair.second.to(device, dtype);
    layer.scaling = weights.config.scaling(path);
    layer.index = index++;
    adapter.layers.emplace(path, std::move(layer));
  }
  if (!unknown.empty() || adapter.layers.empty()) {
    fail(code::kAdapter,
         "The adapter in " + dir + " is for another model: it has " +
             (unknown.empty() ? "no module of this one." : "modules that this model lacks: " + joined(unknown) + "."),
         {{"path", dir}, {"unexpected", unknown}});
  }
  adapter.config = std::move(weights.config);
  return adapter;
}

void activate(VisionLanguageModel& model, const Adapter* adapter) {
  model.visit([&](const std::string& path, Module& module) {
    auto* linear = dynamic_cast<Linear*>(&module);
    if (linear == nullptr) return;
    linear->lora = nullptr;
    if (adapter == nullptr) return;
    const auto it = adapter->layers.find(path);
    if (it != adapter->layers.end()) linear->lora = &it->second;
  });
}

}  // namespace martlet
