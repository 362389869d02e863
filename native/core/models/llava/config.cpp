#include "core/models/llava/config.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/models/config_fields.h"

namespace martlet::llava {
namespace {

using nlohmann::json;

// Defaults: LlamaConfig.
DecoderConfig text_config(const json& text) {
  require_type(text, "text_config", {"llama"}, "LLaVA-1.5");
  DecoderConfig defaults;
  defaults.vocab_size = 32000;
  defaults.hidden_size = 4096;
  defaults.intermediate_size = 11008;
  defaults.num_layers = 32;
  defaults.num_heads = 32;
  defaults.max_positions = 2048;
  DecoderConfig c = decoder_fields(text, defaults);
  c.qkv_bias = c.output_bias = field<bool>(text, "attention_bias", false);
  c.mlp_bias = field<bool>(text, "mlp_bias", false);
  c.rope_theta = rope_fields(text, 10000.0, {"default"}, "LLaVA").theta;
  return c;
}

// Defaults: CLIPVisionConfig.
void vision_config(const json& vision, Config& config) {
  require_type(vision, "vision_config", {"clip_vision_model"}, "LLaVA-1.5");
  VitConfig& c = config.vision;
  c.hidden_size = field<int64_t>(vision, "hidden_size", 768);
  c.intermediate_size = field<int64_t>(vision, "intermediate_size", 3072);
  c.num_layers = field<int64_t>(vision, "num_hidden_layers", 12);
  c.num_heads = field<int64_t>(vision, "num_attention_heads", 12);
  config.image_size = field<int64_t>(vision, "image_size", 224);
  config.patch_size = field<int64_t>(vision, "patch_size", 32);
  c.norm_eps = field<double>(vision, "layer_norm_eps", 1e-5);
  c.activation = parse_activation(field<std::string>(vision, "hidden_act", "quick_gelu"));
  check_positive(c.hidden_size, "vision_config.hidden_size");
  check_positive(c.intermediate_size, "vision_config.intermediate_size");
  check_positive(c.num_layers, "vision_config.num_hidden_layers");
  check_positive(c.num_heads, "vision_config.num_attention_heads");
  check_positive(config.patch_size, "vision_config.patch_size");
  if (field<int64_t>(vision, "num_channels", 3) != 3 || c.hidden_size % c.num_heads != 0 ||
      config.image_size < config.patch_size || config.image_size > 32768) {
    fail(code::kUnsupportedModel,
         "config.json: vision_config has sizes that do not fit together (channels, heads, image, patch).");
  }
  c.patch_elements = 3 * config.patch_size * config.patch_size;
  c.position_rows = 1 + config.patches();
}

}  // namespace

Config parse_config(const json& config) {
  Config c;
  const json text = section(config, "text_config");
  c.text = text_config(text);
  c.text.tie_word_embeddings =
      field<bool>(config, "tie_word_embeddings", field<bool>(text, "tie_word_embeddings", false));
  vision_config(section(config, "vision_config"), c);

  const json layer = config.contains("vision_feature_layer") ? config["vision_feature_layer"] : json(-2);
  for (const json& tap : layer.is_array() ? layer : json::array({layer})) {
    if (!tap.is_number_integer())
      fail(code::kUnsupportedModel, "config.json: vision_feature_layer must be an integer or a list of them.");
    const int64_t given = tap.get<int64_t>();
    const int64_t index = given < 0 ? c.vision.num_layers + 1 + given : given;
    if (index < 0 || index > c.vision.num_layers) {
      fail(code::kUnsupportedModel, "config.json: vision_feature_layer " + std::to_string(given) + " is outside the " +
                                        std::to_string(c.vision.num_layers) + " vision layers.");
    }
    c.taps.push_back(index);
  }
  if (c.taps.empty()) fail(code::kUnsupportedModel, "config.json: vision_feature_layer is an empty list.");
  // What comes after the last layer used is in the file but never read.
  c.vision.num_layers = *std::max_element(c.taps.begin(), c.taps.end());

  const std::string strategy = field<std::string>(config, "vision_feature_select_strategy", "default");
  if (strategy != "default" && strategy != "full") {
    fail(code::kUnsupportedModel,
         "config.json: vision_feature_select_strategy is \"" + strategy + "\"; known are default and full.");
  }
  c.drop_class_token = strategy == "default";
  c.projector_activation = parse_activation(field<std::string>(config, "projector_hidden_act", "gelu"));
  c.projector_bias = field<bool>(config, "multimodal_projector_bias", true);

  c.info.model_type = "llava";
  c.info.family = "llava";
  c.info.vocab_size = c.text.vocab_size;
  c.info.max_positions = c.text.max_positions;
  c.info.image_token_id = field<int64_t>(config, "image_token_index", field<int64_t>(config, "image_token_id", 32000));
  return c;
}

}  // namespace martlet::llava
