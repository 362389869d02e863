#include "core/models/qwen_vl_common/config.h"

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/models/config_fields.h"

namespace martlet::qwen_vl_common {

using nlohmann::json;

json text_section(const json& config) {
  const json text = section(config, "text_config");
  return text.empty() ? config : text;
}

DecoderConfig qwen2_text(const json& config, const char* model) {
  const json text = text_section(config);
  DecoderConfig defaults;
  defaults.vocab_size = 152064;
  defaults.hidden_size = 8192;
  defaults.intermediate_size = 29568;
  defaults.num_layers = 80;
  defaults.num_heads = 64;
  defaults.num_kv_heads = 8;
  defaults.max_positions = 32768;
  defaults.norm_eps = 1e-5;
  DecoderConfig c = decoder_fields(text, defaults);
  c.qkv_bias = true;
  const RopeFields rope = rope_fields(text, 1e6, {"default", "mrope"}, model);
  c.rope_theta = rope.theta;
  c.rope_axis = chunked_axes(
      field<std::vector<int64_t>>(rope.parameters, "mrope_section", std::vector<int64_t>{16, 24, 24}), c.head_dim / 2);
  if (field(text, "use_sliding_window", false)) {
    fail(code::kUnsupportedModel, std::string("config.json: use_sliding_window is not supported for ") + model + ".",
         {{"field", "use_sliding_window"}});
  }
  return c;
}

std::vector<int64_t> chunked_axes(const std::vector<int64_t>& sections, int64_t frequencies) {
  std::vector<int64_t> axes;
  for (size_t i = 0; i < sections.size(); ++i) {
    if (sections[i] >= 0 && sections[i] <= frequencies)
      axes.insert(axes.end(), sections[i], static_cast<int64_t>(i % 3));
  }
  if (static_cast<int64_t>(axes.size()) != frequencies) {
    fail(code::kUnsupportedModel,
         "config.json: the numbers of mrope_section must add up to head_dim / 2 = " + std::to_string(frequencies) + ".",
         {{"field", "mrope_section"}, {"found", sections}});
  }
  return axes;
}

std::vector<int64_t> interleaved_axes(const std::vector<int64_t>& sections, int64_t frequencies) {
  if (sections.size() != 3) {
    fail(code::kUnsupportedModel, "config.json: mrope_section must have three numbers.",
         {{"field", "mrope_section"}, {"found", sections}});
  }
  std::vector<int64_t> axes(frequencies, 0);
  for (int64_t i = 0; i < frequencies; ++i) {
    if (i % 3 != 0 && i < 3 * sections[i % 3]) axes[i] = i % 3;
  }
  return axes;
}

void vision_fields(const json& vision, int64_t default_depth, int64_t default_patch_size, Config& config) {
  VitConfig& c = config.vision;
  c.num_layers = field(vision, "depth", default_depth);
  c.num_heads = field<int64_t>(vision, "num_heads", 16);
  const int64_t patch = field(vision, "patch_size", default_patch_size);
  const int64_t temporal = field<int64_t>(vision, "temporal_patch_size", 2);
  config.merger.merge = field<int64_t>(vision, "spatial_merge_size", 2);
  config.vision_rope_theta = field(section(vision, "rope_parameters"), "rope_theta", 10000.0);
  check_positive(c.num_layers, "vision_config.depth");
  check_positive(c.num_heads, "vision_config.num_heads");
  check_positive(config.merger.merge, "vision_config.spatial_merge_size");
  if (patch < 1 || patch > 1024 || temporal < 1 || temporal > 64 ||
      field<int64_t>(vision, "in_channels", field<int64_t>(vision, "in_chans", 3)) != 3) {
    fail(code::kUnsupportedModel, "config.json: vision_config has sizes that do not fit together (channels, patches).");
  }
  c.patch_elements = 3 * temporal * patch * patch;
  c.class_token = false;
  c.embedding_norm = false;
  c.positions = VitConfig::Positions::kNone;
  c.qkv = VitConfig::Qkv::kFused;
  c.norm_eps = 1e-6;
  c.names.patch_embedding = "patch_embed.proj";
  c.names.position_embedding = "pos_embed.weight";
  c.names.layers = "blocks";
  c.names.norm1 = "norm1";
  c.names.norm2 = "norm2";
  c.names.attention = "attn";
  c.names.attention_out = "proj";
}

void finish(const json& config, const char* model_type, int64_t vision_out, Config& out) {
  const VitConfig& vision = out.vision;
  check_positive(vision.hidden_size, "vision_config.hidden_size");
  check_positive(vision.intermediate_size, "vision_config.intermediate_size");
  if (vision.hidden_size % (4 * vision.num_heads) != 0) {
    fail(code::kUnsupportedModel,
         "config.json: the vision tower's hidden size must be a multiple of four times its number of heads.");
  }
  if (vision_out != out.text.hidden_size) {
    fail(code::kUnsupportedModel,
         "config.json: the vision tower gives features of " + std::to_string(vision_out) +
             " numbers, but the language model's hidden_size is " + std::to_string(out.text.hidden_size) + ".",
         {{"found", vision_out}, {"expected", out.text.hidden_size}});
  }
  out.merger.vision_size = vision.hidden_size;
  out.merger.text_size = vision_out;
  out.merger.norm = vision.norm;
  out.text.tie_word_embeddings =
      field(config, "tie_word_embeddings", false) || field(text_section(config), "tie_word_embeddings", false);
  out.info.model_type = out.info.family = model_type;
  out.info.vocab_size = out.text.vocab_size;
  out.info.max_positions = out.text.max_positions;
  out.info.image_token_id = field<int64_t>(config, "image_token_id", 151655);
  out.info.video_token_id = field<int64_t>(config, "video_token_id", 151656);
}

}  // namespace martlet::qwen_vl_common
