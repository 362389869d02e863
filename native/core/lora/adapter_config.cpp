#include "core/lora/adapter_config.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <regex>

#include "core/base/error.h"
#include "core/base/json.h"

namespace martlet {
namespace {

using nlohmann::json;

// PEFT's get_pattern_key: the pattern matches the path or its ending after a dot.
template <typename T>
const T* find_pattern(const std::map<std::string, T>& patterns, const std::string& path) {
  for (const auto& [pattern, value] : patterns) {
    try {
      if (std::regex_match(path, std::regex("(?:.*\\.)?(?:" + pattern + ")"))) return &value;
    } catch (const std::regex_error&) {
      fail(code::kAdapter,
           "adapter_config.json: the pattern \"" + pattern + "\" is not a regular expression that can be read.");
    }
  }
  return nullptr;
}

bool is_default(const json& value) {
  return value.is_null() || value == false || value == json::object() || value == json::array() || value == "none" ||
         value == "";
}

}  // namespace

int64_t AdapterConfig::rank(const std::string& path) const {
  const int64_t* own = find_pattern(rank_pattern, path);
  return own != nullptr ? *own : r;
}

double AdapterConfig::scaling(const std::string& path) const {
  const double* own = find_pattern(alpha_pattern, path);
  const double alpha = own != nullptr ? *own : lora_alpha, rank_here = static_cast<double>(rank(path));
  return use_rslora ? alpha / std::sqrt(rank_here) : alpha / rank_here;
}

AdapterConfig read_adapter_config(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "adapter_config.json";
  if (!std::filesystem::exists(path)) {
    fail(code::kAdapter, "There is no adapter_config.json in " + dir.string() + ": it is not a PEFT adapter folder.",
         {{"path", dir.string()}});
  }
  json file;
  try {
    file = read_json_file(path);
  } catch (const Error& e) {
    throw Error(code::kAdapter, e.what(), e.details_json());
  }
  const auto wrong = [&](const std::string& field, const std::string& what) {
    fail(code::kAdapter, path.string() + ": \"" + field + "\" " + what + ".",
         {{"path", path.string()}, {"field", field}});
  };
  if (!file.is_object()) wrong("", "is missing: the file is not an object");
  if (file.value("peft_type", json("LORA")) != "LORA")
    wrong("peft_type", "is " + file["peft_type"].dump() + "; only LORA is supported");
  for (const char* field :
       {"fan_in_fan_out", "layers_to_transform", "layers_pattern", "layer_replication", "megatron_config",
        "trainable_token_indices", "lora_bias", "use_qalora", "alora_invocation_tokens", "target_parameters",
        "arrow_config", "corda_config", "eva_config", "loftq_config"}) {
    if (file.contains(field) && !is_default(file[field])) {
      wrong(field, "is " + file[field].dump() +
                       ", which is not supported; merge the adapter with PEFT and load the merged model");
    }
  }
  // These change the base model's weights on loading, so that the pairs mean nothing beside the original ones.
  if (const json init = file.value("init_lora_weights", json(true)); init.is_string() && init != "gaussian") {
    wrong("init_lora_weights", "is " + init.dump() +
                                   ": its pairs belong to weights other than the base model's. Save it again with "
                                   "PEFT's path_initial_model_for_weight_conversion");
  }
  AdapterConfig config;
  try {
    config.use_dora = file.contains("use_dora") && file["use_dora"] == true;
    if (file.contains("bias") && file["bias"].is_string()) config.bias = file["bias"].get<std::string>();
    if (file.contains("modules_to_save") && file["modules_to_save"].is_array())
      config.modules_to_save = file["modules_to_save"].get<std::vector<std::string>>();
    config.r = file.at("r").get<int64_t>();
    config.lora_alpha = file.at("lora_alpha").get<double>();
    config.lora_dropout = file.value("lora_dropout", 0.0);
    config.use_rslora = file.contains("use_rslora") && !file["use_rslora"].is_null() && file["use_rslora"].get<bool>();
    const json base = file.value("base_model_name_or_path", json());
    if (base.is_string()) config.base_model_name_or_path = base.get<std::string>();
    const auto names_or_regex = [&](const char* field, std::vector<std::string>& names, std::string& regex) {
      const json value = file.value(field, json());
      if (value.is_string()) regex = value.get<std::string>();
      if (value.is_array()) names = value.get<std::vector<std::string>>();
    };
    names_or_regex("target_modules", config.target_modules, config.target_regex);
    names_or_regex("exclude_modules", config.exclude_modules, config.exclude_regex);
    if (file.contains("rank_pattern") && file["rank_pattern"].is_object())
      config.rank_pattern = file["rank_pattern"].get<std::map<std::string, int64_t>>();
    if (file.contains("alpha_pattern") && file["alpha_pattern"].is_object())
      config.alpha_pattern = file["alpha_pattern"].get<std::map<std::string, double>>();
  } catch (const json::exception& e) {
    fail(code::kAdapter, path.string() + " cannot be read as a LoRA configuration: " + e.what() + ".",
         {{"path", path.string()}});
  }
  if (config.r < 1 || config.r > 65536) wrong("r", "is " + std::to_string(config.r) + ", out of range");
  return config;
}

std::string adapter_config_json(const AdapterConfig& c) {
  json targets = c.target_regex.empty() ? json(c.target_modules) : json(c.target_regex);
  json excluded = c.exclude_regex.empty() ? json(c.exclude_modules) : json(c.exclude_regex);
  if (excluded.empty()) excluded = nullptr;
  const json file = {{"alpha_pattern", c.alpha_pattern},
                     {"auto_mapping", nullptr},
                     {"base_model_name_or_path", c.base_model_name_or_path},
                     {"bias", c.bias},
                     {"exclude_modules", excluded},
                     {"fan_in_fan_out", false},
                     {"inference_mode", true},
                     {"init_lora_weights", true},
                     {"layers_pattern", nullptr},
                     {"layers_to_transform", nullptr},
                     {"lora_alpha", c.lora_alpha == std::floor(c.lora_alpha) ? json(static_cast<int64_t>(c.lora_alpha))
                                                                             : json(c.lora_alpha)},
                     {"lora_dropout", c.lora_dropout},
                     {"modules_to_save", c.modules_to_save.empty() ? json() : json(c.modules_to_save)},
                     {"peft_type", "LORA"},
                     {"r", c.r},
                     {"rank_pattern", c.rank_pattern},
                     {"revision", nullptr},
                     {"target_modules", targets},
                     {"task_type", "CAUSAL_LM"},
                     {"use_dora", c.use_dora},
                     {"use_rslora", c.use_rslora}};
  return file.dump(2) + "\n";
}

}  // namespace martlet
