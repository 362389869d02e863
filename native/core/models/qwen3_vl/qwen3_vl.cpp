#include "core/models/qwen3_vl/qwen3_vl.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/models/config_fields.h"
#include "core/models/qwen_vl_common/config.h"

namespace martlet {
namespace qwen3_vl {
namespace {

using nlohmann::json;

// Defaults: Qwen3VLTextConfig.
DecoderConfig text_config(const json& config) {
  const json text = qwen_vl_common::text_section(config);
  DecoderConfig defaults;
  defaults.vocab_size = 151936;
  defaults.hidden_size = 4096;
  defaults.intermediate_size = 22016;
  defaults.num_layers = 32;
  defaults.num_heads = 32;
  defaults.num_kv_heads = 32;
  defaults.head_dim = 128;
  defaults.max_positions = 128000;
  DecoderConfig c = decoder_fields(text, defaults);
  c.qkv_bias = c.output_bias = field(text, "attention_bias", false);
  c.qk_norm = true;
  // Interleaved whatever `mrope_interleaved` says, as in the original.
  const RopeFields rope = rope_fields(text, 500000.0, {"default", "mrope"}, "Qwen3-VL");
  c.rope_theta = rope.theta;
  c.rope_axis = qwen_vl_common::interleaved_axes(
      field<std::vector<int64_t>>(rope.parameters, "mrope_section", std::vector<int64_t>{24, 20, 20}), c.head_dim / 2);
  return c;
}

// Defaults: Qwen3VLVisionConfig.
qwen_vl_common::Config parse_config(const json& config) {
  qwen_vl_common::Config c;
  c.text = text_config(config);
  const json vision = section(config, "vision_config");
  qwen_vl_common::vision_fields(vision, 27, 16, c);
  c.vision.hidden_size = field<int64_t>(vision, "hidden_size", 1152);
  c.vision.intermediate_size = field<int64_t>(vision, "intermediate_size", 4304);
  c.vision.activation = parse_activation(field<std::string>(vision, "hidden_act", "gelu_pytorch_tanh"));
  c.vision.patch_bias = true;
  c.vision.positions = VitConfig::Positions::kSampledTable;
  c.vision.position_rows = field<int64_t>(vision, "num_position_embeddings", 2304);
  check_positive(c.vision.position_rows, "vision_config.num_position_embeddings");
  c.vision.names.fc1 = "linear_fc1";
  c.vision.names.fc2 = "linear_fc2";
  c.deepstack_layers = field<std::vector<int64_t>>(vision, "deepstack_visual_indexes", std::vector<int64_t>{8, 16, 24});
  for (const int64_t layer : c.deepstack_layers) {
    if (layer < 0 || layer >= c.vision.num_layers) {
      fail(code::kUnsupportedModel,
           "config.json: deepstack_visual_indexes has " + std::to_string(layer) + ", but the vision tower has " +
               std::to_string(c.vision.num_layers) + " layers.",
           {{"field", "vision_config.deepstack_visual_indexes"}, {"found", layer}});
    }
  }
  // The tower gives them in the order of its layers, whatever the list's order.
  std::sort(c.deepstack_layers.begin(), c.deepstack_layers.end());
  c.frames_apart = true;
  c.merger.norm_name = "norm";
  c.merger.fc1 = "linear_fc1";
  c.merger.fc2 = "linear_fc2";
  qwen_vl_common::finish(config, "qwen3_vl", field<int64_t>(vision, "out_hidden_size", 3584), c);
  c.deepstack_merger = c.merger;
  c.deepstack_merger.norm_after_merge = true;
  return c;
}

std::unique_ptr<VisionLanguageModel> create(const json& config, const WeightSource& stored) {
  return qwen_vl_common::create(parse_config(config), stored);
}

}  // namespace
}  // namespace qwen3_vl

const Family& qwen3_vl_family() {
  static const Family family = {
      "qwen3_vl", {"qwen3_vl"}, qwen_vl_common::canonical_key, qwen_vl_common::is_unused_key, qwen3_vl::create};
  return family;
}

}  // namespace martlet
