#include "core/models/registry.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/models/blip2/blip2.h"
#include "core/models/llava/llava.h"
#include "core/models/minicpm_v/minicpm_v.h"
#include "core/models/qwen2_5_vl/qwen2_5_vl.h"
#include "core/models/qwen2_vl/qwen2_vl.h"
#include "core/models/qwen3_vl/qwen3_vl.h"
#include "core/models/qwen_vl/qwen_vl.h"

namespace martlet {

const Family& family_for(const nlohmann::json& config, const std::string& model_dir) {
  static const std::vector<const Family*> families = {&blip2_family(),      &llava_family(),    &qwen2_vl_family(),
                                                      &qwen2_5_vl_family(), &qwen3_vl_family(), &qwen_vl_family(),
                                                      &minicpm_v_family()};
  const std::string model_type = config.is_object() ? config.value("model_type", nlohmann::json()).dump() : "null";
  std::string known;
  for (const Family* family : families) {
    for (const std::string& type : family->model_types) {
      if (model_type == "\"" + type + "\"") return *family;
    }
    known += (known.empty() ? "" : ", ") + family->model_types[0];
  }
  fail(code::kUnsupportedModel,
       model_dir + "/config.json has model_type " + model_type + ", which is not supported. Supported: " + known + ".",
       {{"path", model_dir + "/config.json"},
        {"modelType", config.is_object() ? config.value("model_type", nlohmann::json()) : nullptr}});
}

std::unique_ptr<VisionLanguageModel> create_model(const Family& family, const nlohmann::json& config,
                                                  const std::string& model_dir, const WeightSource& stored) {
  try {
    return family.create(config, stored ? stored : [](const std::string&) { return at::Tensor(); });
  } catch (const Error& error) {
    // The families know the fields, not the folder.
    const std::string message = error.what();
    if (error.code() != code::kUnsupportedModel || message.rfind("config.json", 0) != 0) throw;
    nlohmann::json details = nlohmann::json::parse(error.details_json());
    details.emplace("path", model_dir + "/config.json");
    fail(code::kUnsupportedModel, model_dir + "/" + message, details);
  }
}

}  // namespace martlet
