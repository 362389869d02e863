#include "core/models/qwen_vl/qwen_vl.h"

#include <ATen/ATen.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"
#include "core/language/decoder.h"
#include "core/models/config_fields.h"
#include "core/projector/resampler.h"
#include "core/vision/vit.h"

namespace martlet {
namespace qwen_vl {
namespace {

using nlohmann::json;

constexpr const char* kVision = "transformer.visual.";

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

struct Config {
  ModelInfo info;
  DecoderConfig text;
  VitConfig vision;
  ResamplerConfig resampler;
  int64_t image_size = 0, patch_size = 0;
};

[[noreturn]] void unsupported(const std::string& what, const char* key) {
  fail(code::kUnsupportedModel, "config.json: " + what + ".", {{"field", key}});
}

// Defaults: configuration_qwen.py and the constructors of visual.py.
DecoderConfig parse_text(const json& config) {
  DecoderConfig c;
  c.vocab_size = field<int64_t>(config, "vocab_size", 151936);
  c.hidden_size = field<int64_t>(config, "hidden_size", 4096);
  c.num_layers = field<int64_t>(config, "num_hidden_layers", 32);
  c.num_heads = c.num_kv_heads = field<int64_t>(config, "num_attention_heads", 32);
  c.head_dim = field<int64_t>(config, "kv_channels", 128);
  // Counts both halves of the gated MLP.
  c.intermediate_size = field<int64_t>(config, "intermediate_size", 22016) / 2;
  c.max_positions = field<int64_t>(config, "max_position_embeddings", 8192);
  c.norm_eps = field(config, "layer_norm_epsilon", 1e-6);
  c.rope_theta = field(config, "rotary_emb_base", 10000.0);
  check_positive(c.vocab_size, "vocab_size");
  check_positive(c.hidden_size, "hidden_size");
  check_positive(c.intermediate_size, "intermediate_size");
  check_positive(c.num_layers, "num_hidden_layers");
  check_positive(c.num_heads, "num_attention_heads");
  check_positive(c.head_dim, "kv_channels");
  if (c.num_heads * c.head_dim != c.hidden_size || c.head_dim % 2 != 0)
    unsupported("hidden_size must be num_attention_heads times an even kv_channels", "kv_channels");
  if (field(config, "rotary_pct", 1.0) != 1.0) unsupported("rotary_pct other than 1 is not supported", "rotary_pct");
  if (field(config, "tie_word_embeddings", false)) unsupported("a tied head is not supported", "tie_word_embeddings");
  c.rope_float32 = true;
  c.fused_qkv = true;
  c.qkv_bias = true;
  c.output_bias = c.mlp_bias = !field(config, "no_bias", true);
  LongContext context;
  context.trained_length = field<int64_t>(config, "seq_length", 2048);
  check_positive(context.trained_length, "seq_length");
  context.dynamic_ntk = field(config, "use_dynamic_ntk", true);
  context.log_scale = field(config, "use_logn_attn", true);
  c.long_context = context;
  c.names.embed_tokens = "wte";
  c.names.layers = "h";
  c.names.norm = "ln_f";
  c.names.input_norm = "ln_1";
  c.names.post_attention_norm = "ln_2";
  c.names.attention = "attn";
  c.names.fused_qkv = "c_attn";
  c.names.attention_out = "c_proj";
  c.names.mlp = {"w2", "w1", "c_proj"};
  return c;
}

Config parse_config(const json& config) {
  const json visual = section(config, "visual");
  if (visual.empty()) {
    fail(code::kUnsupportedModel,
         "config.json has model_type \"qwen\" and no \"visual\": it is Qwen without eyes. Qwen-VL and Qwen-VL-Chat are "
         "supported.",
         {{"field", "visual"}});
  }
  Config c;
  c.text = parse_text(config);
  c.image_size = field<int64_t>(visual, "image_size", 448);
  c.patch_size = field<int64_t>(visual, "patch_size", 14);
  VitConfig& vision = c.vision;
  vision.hidden_size = field<int64_t>(visual, "width", 1664);
  vision.num_layers = field<int64_t>(visual, "layers", 48);
  vision.num_heads = field<int64_t>(visual, "heads", 16);
  vision.intermediate_size =
      static_cast<int64_t>(static_cast<double>(vision.hidden_size) * field(visual, "mlp_ratio", 4.9231));
  check_positive(c.image_size, "visual.image_size");
  check_positive(c.patch_size, "visual.patch_size");
  check_positive(vision.hidden_size, "visual.width");
  check_positive(vision.num_layers, "visual.layers");
  check_positive(vision.num_heads, "visual.heads");
  check_positive(vision.intermediate_size, "visual.mlp_ratio");
  if (c.image_size > (1 << 15) || c.patch_size > c.image_size || vision.hidden_size % vision.num_heads != 0)
    unsupported("visual has sizes that do not fit together", "visual");
  vision.patch_elements = 3 * c.patch_size * c.patch_size;
  vision.class_token = false;
  vision.positions = VitConfig::Positions::kInterpolatedTable;
  vision.position_rows = 256;  // whatever the picture's size
  vision.norm_eps = 1e-6;
  vision.qkv = VitConfig::Qkv::kFusedByHead;
  vision.activation = Activation::kGelu;
  vision.names.patch_embedding = "conv1";
  vision.names.position_embedding = "positional_embedding";
  vision.names.embedding_norm = "ln_pre";
  vision.names.layers = "transformer.resblocks";
  vision.names.norm1 = "ln_1";
  vision.names.norm2 = "ln_2";
  vision.names.attention = "attn";
  vision.names.fused_qkv = "in_proj";
  vision.names.fc1 = "c_fc";
  vision.names.fc2 = "c_proj";

  ResamplerConfig& resampler = c.resampler;
  resampler.queries = field<int64_t>(visual, "n_queries", 256);
  resampler.embed_dim = field<int64_t>(visual, "output_dim", 512);
  resampler.vision_dim = vision.hidden_size;
  resampler.num_heads = resampler.embed_dim / 128;
  resampler.position_table = true;
  check_positive(resampler.queries, "visual.n_queries");
  if (resampler.embed_dim < 128 || resampler.embed_dim % 128 != 0)
    unsupported("visual.output_dim must be a multiple of 128", "visual.output_dim");
  if (resampler.embed_dim != c.text.hidden_size) {
    fail(code::kUnsupportedModel,
         "config.json: the vision tower gives features of " + std::to_string(resampler.embed_dim) +
             " numbers, but the language model's hidden_size is " + std::to_string(c.text.hidden_size) + ".",
         {{"found", resampler.embed_dim}, {"expected", c.text.hidden_size}});
  }
  const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(resampler.queries)));
  if (side * side != resampler.queries) unsupported("visual.n_queries must be a square", "visual.n_queries");

  c.info.model_type = "qwen";
  c.info.family = "qwen_vl";
  c.info.vocab_size = c.text.vocab_size;
  c.info.max_positions = c.text.max_positions;
  c.info.embedding_key = "transformer.wte.weight";
  // <img>, </img> and <imgpad> follow one another.
  c.info.image_token_id = field<int64_t>(visual, "image_start_id", 151857) + 2;
  return c;
}

// The names are those of the files.
std::string canonical_key(const std::string& key) { return key; }

bool is_unused_key(const json&, const std::string& key) {
  // buffers that old versions saved
  return key.find(".rotary_emb.inv_freq") != std::string::npos || key.find(".attn.masked_bias") != std::string::npos ||
         key == "transformer.registered_causal_mask";
}

class QwenVl : public VisionLanguageModel {
 public:
  explicit QwenVl(const Config& config)
      : config_(config),
        transformer_(config.text),
        visual_(config.vision),
        attn_pool_(config.resampler),
        ln_post_(config.resampler.embed_dim, config.resampler.norm_eps),
        lm_head_(config.text.hidden_size, config.text.vocab_size, false) {
    const int64_t dim = config.resampler.embed_dim;
    register_module(transformer_, "transformer");
    register_module(visual_, "transformer.visual");
    register_module(attn_pool_, "transformer.visual.attn_pool");
    register_module(ln_post_, "transformer.visual.ln_post");
    register_parameter(proj_, "transformer.visual.proj", {dim, dim});
    register_module(lm_head_, "lm_head");
  }

  const ModelInfo& info() const override { return config_.info; }

  Part part_of(const std::string& path) const override {
    if (!starts_with(path, kVision)) return Part::kLanguage;
    const std::string rest = path.substr(std::string(kVision).size());
    return starts_with(rest, "attn_pool") || starts_with(rest, "ln_post") || rest == "proj" ? Part::kProjector
                                                                                            : Part::kVision;
  }

  bool is_default_target(const std::string& path) const override { return starts_with(path, "transformer.h."); }

  VisionFeatures image_features(const std::vector<Picture>& pictures, const ForwardOptions& options) const override {
    const int64_t size = config_.image_size / config_.patch_size * config_.patch_size;
    const at::TensorOptions target = visual_.options();
    std::vector<at::Tensor> patches;
    for (const Picture& picture : pictures) {
      const at::Tensor image = picture.on(target.device());
      if (image.dim() != 3 || image.size(1) != config_.image_size || image.size(2) != config_.image_size) {
        fail(code::kImage, "The processor made a picture of " + std::to_string(image.size(-1)) + "×" +
                               std::to_string(image.size(-2)) + " pixels, but the vision tower takes " +
                               std::to_string(config_.image_size) + "×" + std::to_string(config_.image_size) + ".");
      }
      // What is left over at the edges is not seen, as in a convolution.
      const at::Tensor whole = image.narrow(1, 0, size).narrow(2, 0, size).contiguous();
      patches.push_back(cut_patches(whole.unsqueeze(0), config_.patch_size, 1, 1));
    }
    VitLayout layout;
    layout.rows =
        SequenceLengths::from_lengths(std::vector<int64_t>(pictures.size(), patches[0].size(0)), target.device());
    const at::Tensor seen =
        visual_.forward(at::cat(patches).to(target), layout, {config_.vision.num_layers}, options)[0];
    const at::Tensor pooled = attn_pool_.forward(seen, layout.rows, at::Tensor(), options.dropout);
    return {at::matmul(ln_post_.forward(pooled), proj_.value), {}};
  }

  int64_t feature_tokens(const Picture&) const override { return config_.resampler.queries; }

  const LanguageModel& language_model() const override { return transformer_; }
  const at::Tensor& head_weight() const override { return lm_head_.weight.value; }

 private:
  Config config_;
  Decoder transformer_;
  Vit visual_;
  Resampler attn_pool_;
  LayerNorm ln_post_;
  Parameter proj_;
  Linear lm_head_;
};

std::unique_ptr<VisionLanguageModel> create(const json& config, const WeightSource&) {
  return std::make_unique<QwenVl>(parse_config(config));
}

}  // namespace
}  // namespace qwen_vl

const Family& qwen_vl_family() {
  static const Family family = {"qwen_vl", {"qwen"}, qwen_vl::canonical_key, qwen_vl::is_unused_key, qwen_vl::create};
  return family;
}

}  // namespace martlet
