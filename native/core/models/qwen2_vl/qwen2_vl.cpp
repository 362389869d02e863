#include "core/models/qwen2_vl/qwen2_vl.h"

#include <nlohmann/json.hpp>

#include "core/models/config_fields.h"
#include "core/models/qwen_vl_common/config.h"

namespace martlet {
namespace qwen2_vl {
namespace {

// Defaults: Qwen2VLVisionConfig, where `hidden_size` is that of the output.
qwen_vl_common::Config parse_config(const nlohmann::json& config) {
  qwen_vl_common::Config c;
  c.text = qwen_vl_common::qwen2_text(config, "Qwen2-VL");
  const nlohmann::json vision = section(config, "vision_config");
  qwen_vl_common::vision_fields(vision, 32, 14, c);
  c.vision.hidden_size = field<int64_t>(vision, "embed_dim", 1280);
  check_positive(c.vision.hidden_size, "vision_config.embed_dim");
  c.vision.intermediate_size =
      static_cast<int64_t>(static_cast<double>(c.vision.hidden_size) * field(vision, "mlp_ratio", 4.0));
  c.vision.activation = parse_activation(field<std::string>(vision, "hidden_act", "quick_gelu"));
  qwen_vl_common::finish(config, "qwen2_vl", field<int64_t>(vision, "hidden_size", 3584), c);
  return c;
}

std::unique_ptr<VisionLanguageModel> create(const nlohmann::json& config, const WeightSource& stored) {
  return qwen_vl_common::create(parse_config(config), stored);
}

}  // namespace
}  // namespace qwen2_vl

const Family& qwen2_vl_family() {
  static const Family family = {
      "qwen2_vl", {"qwen2_vl"}, qwen_vl_common::canonical_key, qwen_vl_common::is_unused_key, qwen2_vl::create};
  return family;
}

}  // namespace martlet
