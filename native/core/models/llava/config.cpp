#include "core/models/llava/config.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/base/error.h"

namespace martlet::llava {
namespace {

using nlohmann::json;

// A field with its class default; null counts as absent.
template <typename T>
T field(const json& object, const char* key, T fallback) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return fallback;
  try {
    return it->get<T>();
  } catch (const json::exception&) {
    fail(code::kUnsupportedModel,
         std::string("config.json: \"") + key + "\" is " + it->dump() + ", which is not of the expected type.",
         {{"field", key}});
  }
}

json section(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return json::object();
  if (!it->is_object())
    fail(code::kUnsupportedModel, std::string("config.json: \"") + key + "\" must be an object.", {{"field", key}});
  return *it;
}

void require_type(const json& sub, const char* what, const char* expected) {
  const std::string type = field<std::string>(sub, "model_type", expected);
  if (type != expected) {
    fail(code::kUnsupportedModel,
         std::string("config.json: ") + what + ".model_type is \"" + type + "\"; LLaVA-1.5 with \"" + expected +
             "\" is supported.",
         {{"field", std::string(what) + ".model_type"}, {"found", type}});
  }
}

void check_positive(int64_t value, const char* key) {
  // 2^24 is far above any published size and far below what would overflow a product of two.
  if (value < 1 || value > (int64_t{1} << 24)) {
    fail(code::kUnsupportedModel,
         std::string("config.json: \"") + key + "\" is " + std::to_string(value) + ", out of range.", {{"field", key}});
  }
}

// Defaults: LlamaConfig.
DecoderConfig text_config(const json& text) {
  require_type(text, "text_config", "llama");
  DecoderConfig c;
  c.vocab_size = field<int64_t>(text, "vocab_size", 32000);
  c.hidden_size = field<int64_t>(text, "hidden_size", 4096);
  c.intermediate_size = field<int64_t>(text, "intermediate_size", 11008);
  c.num_layers = field<int64_t>(text, "num_hidden_layers", 32);
  c.num_heads = field<int64_t>(text, "num_attention_heads", 32);
  c.num_kv_heads = field<int64_t>(text, "num_key_value_heads", c.num_heads);
  check_positive(c.num_heads, "num_attention_heads");
  check_positive(c.num_kv_heads, "num_key_value_heads");
  c.head_dim = field<int64_t>(text, "head_dim", c.hidden_size / c.num_heads);
  c.max_positions = field<int64_t>(text, "max_position_embeddings", 2048);
  c.norm_eps = field<double>(text, "rms_norm_eps", 1e-6);
  c.attention_bias = field<bool>(text, "attention_bias", false);
  c.mlp_bias = field<bool>(text, "mlp_bias", false);
  check_positive(c.vocab_size, "vocab_size");
  check_positive(c.hidden_size, "hidden_size");
  check_positive(c.intermediate_size, "intermediate_size");
  check_positive(c.num_layers, "num_hidden_layers");
  check_positive(c.head_dim, "head_dim");
  if (c.num_heads % c.num_kv_heads != 0 || c.head_dim % 2 != 0) {
    fail(code::kUnsupportedModel,
         "config.json: num_attention_heads must be a multiple of num_key_value_heads, and head_dim even.");
  }
  if (const std::string act = field<std::string>(text, "hidden_act", "silu"); act != "silu") {
    fail(code::kUnsupportedModel, "config.json: text_config.hidden_act is \"" + act + "\"; a Llama MLP has silu.");
  }
  // 4.x: rope_theta + rope_scaling; 5.x: rope_parameters {rope_theta, rope_type}.
  const json rope = section(text, "rope_parameters");
  c.rope_theta = field<double>(rope, "rope_theta", field<double>(text, "rope_theta", 10000.0));
  for (const json& scaling : {rope, section(text, "rope_scaling")}) {
    const std::string type = field<std::string>(scaling, "rope_type", field<std::string>(scaling, "type", "default"));
    if (type != "default") {
      fail(code::kUnsupportedModel,
           "config.json: rope_type \"" + type + "\" is not supported for LLaVA; supported: default.",
           {{"field", "rope_type"}, {"found", type}});
    }
  }
  return c;
}

// Defaults: CLIPVisionConfig.
VitConfig vision_config(const json& vision) {
  require_type(vision, "vision_config", "clip_vision_model");
  VitConfig c;
  c.hidden_size = field<int64_t>(vision, "hidden_size", 768);
  c.intermediate_size = field<int64_t>(vision, "intermediate_size", 3072);
  c.num_layers = field<int64_t>(vision, "num_hidden_layers", 12);
  c.num_heads = field<int64_t>(vision, "num_attention_heads", 12);
  c.num_channels = field<int64_t>(vision, "num_channels", 3);
  c.image_size = field<int64_t>(vision, "image_size", 224);
  c.patch_size = field<int64_t>(vision, "patch_size", 32);
  c.norm_eps = field<double>(vision, "layer_norm_eps", 1e-5);
  c.activation = parse_activation(field<std::string>(vision, "hidden_act", "quick_gelu"));
  check_positive(c.hidden_size, "vision_config.hidden_size");
  check_positive(c.intermediate_size, "vision_config.intermediate_size");
  check_positive(c.num_layers, "vision_config.num_hidden_layers");
  check_positive(c.num_heads, "vision_config.num_attention_heads");
  check_positive(c.patch_size, "vision_config.patch_size");
  if (c.num_channels != 3 || c.hidden_size % c.num_heads != 0 || c.image_size < c.patch_size || c.image_size > 32768) {
    fail(code::kUnsupportedModel,
         "config.json: vision_config has sizes that do not fit together (channels, heads, image, patch).");
  }
  return c;
}

}  // namespace

Config parse_config(const json& config) {
  Config c;
  const json text = section(config, "text_config");
  c.text = text_config(text);
  c.text.tie_word_embeddings =
      field<bool>(config, "tie_word_embeddings", field<bool>(text, "tie_word_embeddings", false));
  c.vision = vision_config(section(config, "vision_config"));

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
