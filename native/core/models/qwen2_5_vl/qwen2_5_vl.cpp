#include "core/models/qwen2_5_vl/qwen2_5_vl.h"

#include <nlohmann/json.hpp>

#include "core/models/config_fields.h"
#include "core/models/qwen_vl_common/config.h"

namespace martlet {
namespace qwen2_5_vl {
namespace {

// Defaults: Qwen2_5_VLVisionConfig.
qwen_vl_common::Config parse_config(const nlohmann::json& config) {
  qwen_vl_common::Config c;
  c.text = qwen_vl_common::qwen2_text(config, "Qwen2.5-VL");
  const nlohmann::json vision = section(config, "vision_config");
  qwen_vl_common::vision_fields(vision, 32, 14, c);
  c.vision.hidden_size = field<int64_t>(vision, "hidden_size", 3584);
  c.vision.intermediate_size = field<int64_t>(vision, "intermediate_size", 3420);
  c.vision.norm = NormType::kRms;
  c.vision.gated_mlp = true;
  if (const std::string act = field<std::string>(vision, "hidden_act", "silu"); act != "silu") {
    fail(code::kUnsupportedModel,
         "config.json: vision_config.hidden_act is \"" + act + "\"; Qwen2.5-VL with \"silu\" is supported.",
         {{"field", "vision_config.hidden_act"}, {"found", act}});
  }
  const int64_t window_size = field<int64_t>(vision, "window_size", 112);
  c.window = window_size / c.merger.merge / field<int64_t>(vision, "patch_size", 14);
  check_positive(c.window, "vision_config.window_size");
  c.vision.full_attention_layers =
      field<std::vector<int64_t>>(vision, "fullatt_block_indexes", std::vector<int64_t>{7, 15, 23, 31});
  c.tokens_per_second = field<int64_t>(vision, "tokens_per_second", 4);
  qwen_vl_common::finish(config, "qwen2_5_vl", field<int64_t>(vision, "out_hidden_size", 3584), c);
  return c;
}

std::unique_ptr<VisionLanguageModel> create(const nlohmann::json& config, const WeightSource& stored) {
  return qwen_vl_common::create(parse_config(config), stored);
}

}  // namespace
}  // namespace qwen2_5_vl

const Family& qwen2_5_vl_family() {
  static const Family family = {
      "qwen2_5_vl", {"qwen2_5_vl"}, qwen_vl_common::canonical_key, qwen_vl_common::is_unused_key, qwen2_5_vl::create};
  return family;
}

}  // namespace martlet
