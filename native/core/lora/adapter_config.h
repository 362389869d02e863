// PEFT's adapter_config.json, as far as it says something about LoRA and DoRA.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace martlet {

struct AdapterConfig {
  std::string base_model_name_or_path;
  int64_t r = 8;
  double lora_alpha = 32;
  double lora_dropout = 0.05;
  bool use_rslora = false;  // scaling α/√r instead of α/r
  bool use_dora = false;
  std::string bias = "none";  // biases of the base model that are trained and saved too: none | all | lora_only
  std::vector<std::string> modules_to_save;  // modules that are trained as a whole
  std::vector<std::string> target_modules;
  std::string target_regex;  // instead of the list
  // What target_modules match and no pair was trained for: module paths or their endings, or one regular expression.
  std::vector<std::string> exclude_modules;
  std::string exclude_regex;
  // Exceptions by module name pattern (PEFT: matches a path that ends with it).
  std::map<std::string, int64_t> rank_pattern;
  std::map<std::string, double> alpha_pattern;

  int64_t rank(const std::string& module_path) const;
  double scaling(const std::string& module_path) const;
};

// ERR_MARTLET_ADAPTER names the file and the field. A field that would change the arithmetic and is not supported
// (DoRA, biases, …) is an error.
AdapterConfig read_adapter_config(const std::filesystem::path& dir);
// The text of adapter_config.json.
std::string adapter_config_json(const AdapterConfig& config);

}  // namespace martlet
