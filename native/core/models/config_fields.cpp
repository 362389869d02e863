#include "core/models/config_fields.h"

#include <algorithm>

namespace martlet {

using nlohmann::json;

namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

json section(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return json::object();
  if (!it->is_object())
    fail(code::kUnsupportedModel, std::string("config.json: \"") + key + "\" must be an object.", {{"field", key}});
  return *it;
}

void require_type(const json& part, const char* what, const std::vector<std::string>& expected, const char* model) {
  const std::string type = field<std::string>(part, "model_type", expected[0]);
  if (std::find(expected.begin(), expected.end(), type) != expected.end()) return;
  fail(code::kUnsupportedModel,
       std::string("config.json: ") + what + ".model_type is \"" + type + "\"; " + model + " with \"" + expected[0] +
           "\" is supported.",
       {{"field", std::string(what) + ".model_type"}, {"found", type}});
}

void check_positive(int64_t value, const char* key) {
  // 2^24 is far above any published size and far below what would overflow a product of two.
  if (value < 1 || value > (int64_t{1} << 24)) {
    fail(code::kUnsupportedModel,
         std::string("config.json: \"") + key + "\" is " + std::to_string(value) + ", out of range.", {{"field", key}});
  }
}

DecoderConfig decoder_fields(const json& text, DecoderConfig c) {
  c.vocab_size = field(text, "vocab_size", c.vocab_size);
  c.hidden_size = field(text, "hidden_size", c.hidden_size);
  c.intermediate_size = field(text, "intermediate_size", c.intermediate_size);
  c.num_layers = field(text, "num_hidden_layers", c.num_layers);
  c.num_heads = field(text, "num_attention_heads", c.num_heads);
  c.num_kv_heads = field(text, "num_key_value_heads", c.num_kv_heads > 0 ? c.num_kv_heads : c.num_heads);
  check_positive(c.num_heads, "num_attention_heads");
  check_positive(c.num_kv_heads, "num_key_value_heads");
  c.head_dim = field(text, "head_dim", c.head_dim > 0 ? c.head_dim : c.hidden_size / c.num_heads);
  c.max_positions = field(text, "max_position_embeddings", c.max_positions);
  c.norm_eps = field(text, "rms_norm_eps", c.norm_eps);
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
    fail(code::kUnsupportedModel,
         "config.json: the language model's hidden_act is \"" + act + "\"; a gated MLP has silu.");
  }
  return c;
}

RopeFields rope_fields(const json& text, double default_theta, const std::vector<std::string>& types,
                       const char* model) {
  RopeFields rope;
  rope.parameters = section(text, "rope_parameters");
  rope.parameters.update(section(text, "rope_scaling"));
  rope.theta = field(rope.parameters, "rope_theta", field(text, "rope_theta", default_theta));
  const std::string type =
      field<std::string>(rope.parameters, "rope_type", field<std::string>(rope.parameters, "type", "default"));
  if (std::find(types.begin(), types.end(), type) == types.end()) {
    fail(
        code::kUnsupportedModel,
        "config.json: rope_type \"" + type + "\" is not supported for " + model + "; supported: " + joined(types) + ".",
        {{"field", "rope_type"}, {"found", type}});
  }
  return rope;
}

}  // namespace martlet
