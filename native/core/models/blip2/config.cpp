#include "core/models/blip2/config.h"

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/models/config_fields.h"

namespace martlet::blip2 {
namespace {

using nlohmann::json;

constexpr const char* kName = "BLIP-2";

[[noreturn]] void unsupported(const std::string& what, const char* key) {
  fail(code::kUnsupportedModel, "config.json: " + what + ".", {{"field", key}});
}

double rate(const json& part, const char* key, double fallback) {
  const double p = field(part, key, fallback);
  if (!(p >= 0 && p < 1)) unsupported(std::string(key) + " is " + std::to_string(p) + ", which is no dropout", key);
  return p;
}

void check_sizes(const TextConfig& c) {
  check_positive(c.vocab_size, "text_config.vocab_size");
  check_positive(c.hidden_size, "text_config.hidden_size");
  check_positive(c.intermediate_size, "text_config: the size of the MLP");
  check_positive(c.num_layers, "text_config.num_hidden_layers");
  check_positive(c.num_heads, "text_config.num_attention_heads");
  check_positive(c.head_dim, "text_config: the size of a head");
}

// Defaults: OPTConfig.
DecoderConfig opt_config(const json& text, ModelInfo& info) {
  DecoderConfig c;
  c.vocab_size = field<int64_t>(text, "vocab_size", 50272);
  c.hidden_size = field<int64_t>(text, "hidden_size", 768);
  c.intermediate_size = field<int64_t>(text, "ffn_dim", 3072);
  c.num_layers = field<int64_t>(text, "num_hidden_layers", 12);
  c.num_heads = c.num_kv_heads = field<int64_t>(text, "num_attention_heads", 12);
  c.max_positions = field<int64_t>(text, "max_position_embeddings", 2048);
  check_positive(c.num_heads, "text_config.num_attention_heads");
  check_positive(c.max_positions, "text_config.max_position_embeddings");
  c.head_dim = c.hidden_size / c.num_heads;
  check_sizes(c);
  if (c.hidden_size % c.num_heads != 0) {
    unsupported("text_config.hidden_size is not a multiple of num_attention_heads", "text_config.hidden_size");
  }
  // What OPT-350m alone has, which no BLIP-2 is made of.
  if (field<int64_t>(text, "word_embed_proj_dim", c.hidden_size) != c.hidden_size)
    unsupported("text_config.word_embed_proj_dim differs from hidden_size", "text_config.word_embed_proj_dim");
  if (!field(text, "do_layer_norm_before", true) || field(text, "_remove_final_layer_norm", false))
    unsupported("text_config asks for OPT with its norms after the layers", "text_config.do_layer_norm_before");
  if (!field(text, "layer_norm_elementwise_affine", true))
    unsupported("text_config asks for norms without weights", "text_config.layer_norm_elementwise_affine");
  c.norm = NormType::kLayer;
  c.norm_eps = 1e-5;
  c.position_offset = 2;
  c.qkv_bias = c.output_bias = c.mlp_bias = field(text, "enable_bias", true);
  c.plain_mlp = parse_activation(field<std::string>(text, "activation_function", "relu"));
  c.dropout = rate(text, "dropout", 0.1);
  c.attention_dropout = rate(text, "attention_dropout", 0.0);
  c.tie_word_embeddings = field(text, "tie_word_embeddings", true);
  c.names.norm = "final_layer_norm";
  c.names.input_norm = "self_attn_layer_norm";
  c.names.post_attention_norm = "final_layer_norm";
  c.names.attention_out = "out_proj";
  info.embedding_key = "language_model.model.decoder.embed_tokens.weight";
  return c;
}

// Defaults: T5Config.
T5Config t5_config(const json& text, ModelInfo& info) {
  T5Config c;
  c.vocab_size = field<int64_t>(text, "vocab_size", 32128);
  c.hidden_size = field<int64_t>(text, "d_model", 512);
  c.head_dim = field<int64_t>(text, "d_kv", 64);
  c.intermediate_size = field<int64_t>(text, "d_ff", 2048);
  c.encoder_layers = field<int64_t>(text, "num_layers", 6);
  c.num_layers = field<int64_t>(text, "num_decoder_layers", c.encoder_layers);
  c.num_heads = c.num_kv_heads = field<int64_t>(text, "num_heads", 8);
  c.buckets = field<int64_t>(text, "relative_attention_num_buckets", 32);
  c.max_distance = field<int64_t>(text, "relative_attention_max_distance", 128);
  c.norm_eps = field(text, "layer_norm_epsilon", 1e-6);
  c.dropout = rate(text, "dropout_rate", 0.1);
  check_sizes(c);
  check_positive(c.encoder_layers, "text_config.num_layers");
  if (c.buckets < 4 || c.buckets > 4096 || c.max_distance <= c.buckets / 2 || c.max_distance > (1 << 24)) {
    unsupported("text_config's relative attention has sizes that do not fit together",
                "text_config.relative_attention_num_buckets");
  }
  // `gated-gelu` alone means the tanh form; an explicit dense_act_fn says otherwise.
  const std::string projection = field<std::string>(text, "feed_forward_proj", "relu");
  c.gated_mlp = projection.rfind("gated-", 0) == 0;
  const std::string implied = c.gated_mlp ? projection.substr(6) : projection;
  c.activation =
      parse_activation(field<std::string>(text, "dense_act_fn", projection == "gated-gelu" ? "gelu_new" : implied));
  c.gated_mlp = field(text, "is_gated_act", c.gated_mlp);
  // transformers 5 says `tie_word_embeddings: true` of every T5, and keeps here what the file said.
  c.scaled_output = field(text, "scale_decoder_outputs", field(text, "tie_word_embeddings", true));
  c.tie_word_embeddings = c.scaled_output;
  info.embedding_key = "language_model.shared.weight";
  info.decoder_start_id = field<int64_t>(text, "decoder_start_token_id", field<int64_t>(text, "pad_token_id", 0));
  if (info.decoder_start_id < 0 || info.decoder_start_id >= c.vocab_size)
    unsupported("text_config.decoder_start_token_id is outside the vocabulary", "text_config.decoder_start_token_id");
  return c;
}

// Defaults: Blip2VisionConfig.
void vision_config(const json& vision, Config& config) {
  require_type(vision, "vision_config", {"blip_2_vision_model"}, kName);
  VitConfig& c = config.vision;
  c.hidden_size = field<int64_t>(vision, "hidden_size", 1408);
  c.intermediate_size = field<int64_t>(vision, "intermediate_size", 6144);
  c.num_layers = field<int64_t>(vision, "num_hidden_layers", 39);
  c.num_heads = field<int64_t>(vision, "num_attention_heads", 16);
  config.image_size = field<int64_t>(vision, "image_size", 224);
  config.patch_size = field<int64_t>(vision, "patch_size", 14);
  check_positive(c.hidden_size, "vision_config.hidden_size");
  check_positive(c.intermediate_size, "vision_config.intermediate_size");
  check_positive(c.num_layers, "vision_config.num_hidden_layers");
  check_positive(c.num_heads, "vision_config.num_attention_heads");
  check_positive(config.patch_size, "vision_config.patch_size");
  if (field<int64_t>(vision, "num_channels", 3) != 3 || c.hidden_size % c.num_heads != 0 ||
      config.image_size < config.patch_size || config.image_size > 32768) {
    unsupported("vision_config has sizes that do not fit together (channels, heads, image, patch)", "vision_config");
  }
  if (!field(vision, "qkv_bias", true)) unsupported("vision_config.qkv_bias is false", "vision_config.qkv_bias");
  if (rate(vision, "attention_dropout", 0.0) > 0)
    unsupported("vision_config.attention_dropout is not 0", "vision_config.attention_dropout");
  const int64_t side = config.image_size / config.patch_size;
  c.patch_elements = 3 * config.patch_size * config.patch_size;
  c.patch_bias = true;
  c.position_rows = 1 + side * side;
  c.embedding_norm = false;
  c.norm_eps = field(vision, "layer_norm_eps", 1e-6);
  c.qkv = VitConfig::Qkv::kFused;
  c.activation = parse_activation(field<std::string>(vision, "hidden_act", "gelu"));
  c.names.position_embedding = "embeddings.position_embedding";
  c.names.attention_out = "projection";
}

// Defaults: Blip2QFormerConfig.
void q_former_config(const json& part, Config& config) {
  require_type(part, "qformer_config", {"blip_2_qformer"}, kName);
  QFormerConfig& c = config.q_former;
  c.hidden_size = field<int64_t>(part, "hidden_size", 768);
  c.intermediate_size = field<int64_t>(part, "intermediate_size", 3072);
  c.num_layers = field<int64_t>(part, "num_hidden_layers", 12);
  c.num_heads = field<int64_t>(part, "num_attention_heads", 12);
  c.cross_attention_frequency = field<int64_t>(part, "cross_attention_frequency", 2);
  c.vision_size = config.vision.hidden_size;  // whatever encoder_hidden_size says, as in the original
  c.norm_eps = field(part, "layer_norm_eps", 1e-12);
  c.activation = parse_activation(field<std::string>(part, "hidden_act", "gelu"));
  c.dropout = rate(part, "hidden_dropout_prob", 0.1);
  c.attention_dropout = rate(part, "attention_probs_dropout_prob", 0.1);
  check_positive(c.hidden_size, "qformer_config.hidden_size");
  check_positive(c.intermediate_size, "qformer_config.intermediate_size");
  check_positive(c.num_layers, "qformer_config.num_hidden_layers");
  check_positive(c.num_heads, "qformer_config.num_attention_heads");
  check_positive(c.cross_attention_frequency, "qformer_config.cross_attention_frequency");
  if (c.hidden_size % c.num_heads != 0) {
    unsupported("qformer_config.hidden_size is not a multiple of num_attention_heads", "qformer_config.hidden_size");
  }
  if (field(part, "use_qformer_text_input", false)) {
    unsupported(
        "qformer_config.use_qformer_text_input is true: its Q-Former reads text, as that of retrieval and of "
        "InstructBLIP does",
        "qformer_config.use_qformer_text_input");
  }
}

}  // namespace

Config parse_config(const json& config) {
  Config c;
  const json text = section(config, "text_config");
  require_type(text, "text_config", {"opt", "t5"}, kName);
  if (field<std::string>(text, "model_type", "opt") == "t5") {
    c.text = t5_config(text, c.info);
  } else {
    c.text = opt_config(text, c.info);
  }
  vision_config(section(config, "vision_config"), c);
  q_former_config(section(config, "qformer_config"), c);
  c.query_tokens = field<int64_t>(config, "num_query_tokens", 32);
  check_positive(c.query_tokens, "num_query_tokens");

  c.info.model_type = "blip-2";
  c.info.family = "blip2";
  c.info.vocab_size = c.text_sizes().vocab_size;
  c.info.max_positions = c.text_sizes().max_positions;
  c.info.head_key = "language_model.lm_head.weight";
  c.info.whole_projector = c.info.has_dropout = true;
  // Files of before transformers 4.46 name no image token: the first id without an embedding stands for it.
  c.info.image_token_id =
      field(config, "image_token_index", field<int64_t>(config, "image_token_id", c.info.vocab_size));
  return c;
}

}  // namespace martlet::blip2
