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

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

std::regex compiled_target(const std::string& regex) {
  try {
    return std::regex(regex);
  } catch (const std::regex_error&) {
    fail(code::kConfig, "target_modules: \"" + regex + "\" is not a regular expression that can be read.",
         {{"path", "target_modules"}});
  }
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

// The last `count` names of a path.
std::string ending(const std::string& path, int64_t count) {
  size_t begin = path.size();
  for (; count > 0 && begin != std::string::npos; --count)
    begin = begin == 0 ? std::string::npos : path.rfind('.', begin - 1);
  return begin == std::string::npos ? path : path.substr(begin + 1);
}

// Fills peft_excluded: PEFT would make pairs for what peft_names or peft_regex match of `absent`, and miss them in the
// file. Endings hold in the module paths of every transformers version; they are as long as it takes to mean no module
// of the model.
void exclude_for_peft(TargetSelection& selection, const std::vector<std::string>& all,
                      const std::vector<std::string>& absent) {
  std::vector<std::string> matched;
  const std::regex regex(selection.peft_regex);
  for (const std::string& path : absent) {
    const bool found = selection.peft_regex.empty()
                           ? std::any_of(selection.peft_names.begin(), selection.peft_names.end(),
                                         [&](const std::string& name) { return matches_name(path, name); })
                           : std::regex_match(path, regex);
    if (found && std::find(all.begin(), all.end(), path) == all.end()) matched.push_back(path);
  }
  if (matched.empty()) return;
  const auto means_a_module = [&](int64_t count) {
    return std::any_of(matched.begin(), matched.end(), [&](const std::string& path) {
      return std::any_of(all.begin(), all.end(),
                         [&](const std::string& module) { return matches_name(module, ending(path, count)); });
    });
  };
  int64_t count = 1;
  while (means_a_module(count)) ++count;
  for (const std::string& path : matched) selection.peft_excluded.push_back(ending(path, count));
}

// Whether a module is, or lies in, one that `name` means.
bool is_inside(const std::string& path, const std::string& name) {
  const std::string inner = "." + path + ".";
  return inner.find("." + name + ".") != std::string::npos;
}

}  // namespace

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

bool is_named_target(const std::string& path, const std::vector<std::string>& names, const std::string& regex) {
  if (!regex.empty() && std::regex_match(path, compiled_target(regex))) return true;
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) { return matches_name(path, name); });
}

std::vector<std::string> nearest_names(const std::string& name, const std::set<std::string>& candidates) {
  std::vector<std::pair<size_t, std::string>> ranked;
  for (const std::string& candidate : candidates) ranked.emplace_back(edit_distance(name, candidate), candidate);
  std::sort(ranked.begin(), ranked.end());
  std::vector<std::string> out;
  for (size_t i = 0; i < ranked.size() && i < 3; ++i) out.push_back(ranked[i].second);
  return out;
}

std::map<std::string, Linear*> linears_of(VisionLanguageModel& model) {
  std::map<std::string, Linear*> linears;
  model.visit([&](const std::string& path, Module& module) {
    if (auto* linear = dynamic_cast<Linear*>(&module); linear != nullptr && !model.info().is_head(path))
      linears.emplace(path, linear);
  });
  return linears;
}

int64_t Adapter::numel() const {
  int64_t count = 0;
  for (const auto& [path, layer] : layers)
    count += layer.a.numel() + layer.b.numel() + (layer.magnitude.defined() ? layer.magnitude.numel() : 0);
  for (const auto& [name, value] : saved) count += value.numel();
  return count;
}

TargetSelection select_targets(VisionLanguageModel& model, const std::vector<std::string>& names,
                               const std::string& regex, const FreezeFlags& freeze,
                               const std::vector<std::string>& absent,
                               const std::vector<std::string>& modules_to_save) {
  std::vector<std::pair<std::string, Linear*>> linears;
  std::vector<std::string> all;
  std::set<std::string> last_names;
  model.visit([&](const std::string& path, Module& module) {
    all.push_back(path);
    auto* linear = dynamic_cast<Linear*>(&module);
    if (linear == nullptr || model.info().is_head(path)) return;
    linears.emplace_back(path, linear);
    last_names.insert(path.substr(path.rfind('.') + 1));
  });

  std::regex pattern;
  if (!regex.empty()) pattern = compiled_target(regex);

  TargetSelection out;
  std::set<std::string> matched_names;
  std::set<Part> refused;
  std::map<std::string, int64_t> saved_whole;
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
    const auto whole = std::find_if(modules_to_save.begin(), modules_to_save.end(),
                                    [&](const std::string& name) { return is_inside(path, name); });
    if (whole != modules_to_save.end()) {
      ++saved_whole[*whole];
      continue;
    }
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
  std::string whole_names;
  for (const auto& [name, count] : saved_whole) {
    whole_names += (whole_names.empty() ? "" : ", ") + name;
    out.warnings.push_back("target_modules match " + std::to_string(count) + " module(s) of modules_to_save (" + name +
                           "): they are trained as a whole and get no pairs, as in PEFT.");
  }
  std::string without_pairs;
  for (const std::string& name : names) {
    if (matched_names.count(name)) continue;
    if (std::any_of(all.begin(), all.end(), [&](const std::string& path) { return matches_name(path, name); })) {
      without_pairs =
          name + " gets no adapter: only linear modules other than the head do. modules_to_save trains it as a whole.";
      out.warnings.push_back(without_pairs);
    } else {
      out.unmatched.emplace_back(name, nearest_names(name, last_names));
    }
  }
  if (out.linears.empty()) {
    const std::string asked = regex.empty() ? joined(names) : regex;
    const std::vector<std::string> known(last_names.begin(), last_names.end());
    std::string hint = without_pairs.empty() ? "" : " " + without_pairs;
    if (!whole_names.empty()) {
      hint += " The modules that did match are trained as a whole, by modules_to_save (" + whole_names + ").";
    } else if (asked == "all-linear") {
      hint = " Every part with such modules is frozen or trained as a whole; sft_type: full trains a projector alone.";
    }
    fail(code::kConfig,
         "target_modules matched no module that may be trained (asked for: " + asked +
             "). The model's linear modules are: " + joined(known) +
             (refused.empty()
                  ? "."
                  : "; the modules that did match are in a frozen part (see freeze_vit, freeze_aligner, freeze_llm).") +
             hint,
         {{"path", "target_modules"}, {"asked", asked}, {"known", known}});
  }
  describe_for_peft(out, all);
  exclude_for_peft(out, all, absent);
  return out;
}

LoraInit LoraInit::parse(const std::string& name) {
  if (name == "true") return {};
  if (name == "gaussian") return {Type::kGaussian};
  if (name == "false") return {Type::kRandom};
  if (name == "pissa") return {Type::kPissa};
  const std::string prefix = "pissa_niter_";
  if (name.rfind(prefix, 0) == 0 && name.size() > prefix.size() && name.size() < prefix.size() + 4 &&
      name.find_first_not_of("0123456789", prefix.size()) == std::string::npos) {
    return {Type::kPissa, std::stoll(name.substr(prefix.size()))};
  }
  fail(code::kConfig,
       "init_weights \"" + name + "\" is not supported; known are true, false, gaussian, pissa and pissa_niter_N.",
       {{"path", "init_weights"}});
}

namespace {

// The r largest singular values of w with their vectors: u [out, r], s [r], v [in, r].
std::tuple<at::Tensor, at::Tensor, at::Tensor> largest_singular(const at::Tensor& w, int64_t r, int64_t iterations,
                                                                at::Generator& generator) {
  if (iterations < 0) {
    const auto [u, s, vh] = at::linalg_svd(w, /*full_matrices=*/false);
    return {u.narrow(1, 0, r), s.narrow(0, 0, r), vh.narrow(0, 0, r).t()};
  }
  // Halko et al. 2009, algorithm 4.4 and 5.1, as torch.svd_lowrank.
  const at::Tensor test = at::empty({w.size(1), r}, at::kFloat).normal_(0, 1, generator).to(w.device());
  at::Tensor q = std::get<0>(at::linalg_qr(at::mm(w, test)));
  for (int64_t i = 0; i < iterations; ++i) {
    q = std::get<0>(at::linalg_qr(at::mm(w.t(), q)));
    q = std::get<0>(at::linalg_qr(at::mm(w, q)));
  }
  const auto [u, s, vh] = at::linalg_svd(at::mm(q.t(), w), /*full_matrices=*/false);
  return {at::mm(q, u), s, vh.t()};
}

}  // namespace

Adapter create_adapter(const TargetSelection& targets, const AdapterConfig& config, const LoraInit& init, uint64_t seed,
                       at::Device device) {
  const at::NoGradGuard no_grad;
  Adapter adapter;
  adapter.config = config;
  int64_t index = 0;
  for (const auto& [path, linear] : targets.linears) {
    LoraLayer layer;
    layer.scaling = config.scaling(path);
    layer.dropout = config.lora_dropout;
    layer.index = index++;
    // One generator a module, so that the values of a layer do not depend on which other layers are trained.
    at::Generator generator = make_generator(at::kCPU);
    generator.set_current_seed(mix_seed(seed, std::hash<std::string>{}(path)));
    const auto f32 = at::TensorOptions().dtype(at::kFloat).device(device);
    if (init.type == LoraInit::Type::kPissa) {
      if (config.r > std::min(linear->in_features(), linear->out_features())) {
        fail(code::kConfig, "init_weights: pissa with lora_rank " + std::to_string(config.r) + " is too much for " +
                                path + ", which is " + std::to_string(linear->out_features()) + "×" +
                                std::to_string(linear->in_features()) + ".");
      }
      const auto [u, s, v] =
          largest_singular(linear->weight.value.to(at::kFloat), config.r, init.pissa_iterations, generator);
      const at::Tensor root = (s / layer.scaling).sqrt();
      layer.a = (root.unsqueeze(1) * v.t()).contiguous();
      layer.b = (u * root.unsqueeze(0)).contiguous();
    } else {
      const at::Tensor a = at::empty({config.r, linear->in_features()}, at::kFloat);
      const double bound = 1.0 / std::sqrt(static_cast<double>(linear->in_features()));
      if (init.type == LoraInit::Type::kGaussian) {
        a.normal_(0, 1.0 / static_cast<double>(config.r), generator);
      } else {
        a.uniform_(-bound, bound, generator);
      }
      layer.a = a.to(device);
      layer.b = at::zeros({linear->out_features(), config.r}, f32);
      if (init.type == LoraInit::Type::kRandom) {
        const double wide = 1.0 / std::sqrt(static_cast<double>(config.r));
        layer.b.copy_(at::empty(layer.b.sizes(), at::kFloat).uniform_(-wide, wide, generator));
      }
    }
    if (config.use_dora) {
      // PEFT sets the magnitudes once the pair is there: those of W + scaling · B A.
      refresh_weight_norm(linear->weight, layer);
      layer.magnitude = layer.weight_norm.clone();
    }
    adapter.layers.emplace(path, std::move(layer));
  }
  adapter.config.target_modules = targets.peft_names;
  adapter.config.target_regex = targets.peft_regex;
  adapter.config.exclude_modules = targets.peft_excluded;
  return adapter;
}

void subtract_pairs(VisionLanguageModel& model, const Adapter& adapter,
                    const std::function<at::Tensor(const std::string&)>& original) {
  const at::NoGradGuard no_grad;
  const auto linears = linears_of(model);
  for (const auto& [path, layer] : adapter.layers) {
    at::Tensor& weight = linears.at(path)->weight.value;
    const at::Tensor w = original(path + ".weight").to(weight.device(), at::kFloat);
    weight.copy_(at::addmm(w, layer.b.detach(), layer.a.detach(), 1.0, -layer.scaling));
  }
}

Adapter attach_adapter(VisionLanguageModel& model, AdapterWeights weights,
                       const std::function<bool(const std::string&)>& is_unused, at::ScalarType dtype,
                       at::Device device, const std::string& dir) {
  const std::map<std::string, Linear*> linears = linears_of(model);
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
    if (pair.a.size(1) != linear.in_features() || pair.b.size(0) != linear.out_features() ||
        (pair.magnitude.defined() && pair.magnitude.size(0) != linear.out_features())) {
      fail(code::kAdapter,
           "The adapter in " + dir + " is for another model: " + path + " is " + std::to_string(linear.out_features()) +
               "×" + std::to_string(linear.in_features()) + " here, the adapter's is " +
               std::to_string(pair.b.size(0)) + "×" + std::to_string(pair.a.size(1)) + ".",
           {{"path", dir}, {"module", path}});
    }
    LoraLayer layer;
    layer.a = pair.a.to(device, dtype);
    layer.b = pair.b.to(device, dtype);
    layer.scaling = weights.config.scaling(path);
    layer.index = index++;
    if (pair.magnitude.defined()) {
      layer.magnitude = pair.magnitude.to(device, at::kFloat);
      refresh_weight_norm(linear.weight, layer);
    }
    adapter.layers.emplace(path, std::move(layer));
  }
  if (!weights.saved_modules.empty()) {
    std::map<std::string, const Parameter*> parameters;
    model.visit_parameters(
        [&](const std::string& name, Parameter& parameter) { parameters.emplace(name, &parameter); });
    for (const auto& [name, value] : weights.saved_modules) {
      const auto it = parameters.find(name);
      if (it == parameters.end()) {
        if (!is_unused(name)) unknown.push_back(name);
        continue;
      }
      if (value.numel() != it->second->numel()) {
        fail(code::kAdapter, "The adapter in " + dir + " is for another model: the shape of " + name + " differs.",
             {{"path", dir}, {"module", name}});
      }
      // What stays float32 in a float16 model does so here.
      const at::ScalarType own = dtype == at::kFloat ? dtype : it->second->dtype();
      adapter.saved.emplace(name, value.reshape(it->second->shape).to(device, own));
    }
  }
  if (!unknown.empty() || (adapter.layers.empty() && adapter.saved.empty())) {
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
  model.visit_parameters([&](const std::string& name, Parameter& parameter) {
    if (parameter.replaced) {
      parameter.value = *parameter.replaced;
      parameter.replaced.reset();
    }
    if (adapter == nullptr) return;
    const auto it = adapter->saved.find(name);
    if (it == adapter->saved.end()) return;
    parameter.replaced = parameter.value;
    parameter.value = it->second;
  });
}

}  // namespace martlet
