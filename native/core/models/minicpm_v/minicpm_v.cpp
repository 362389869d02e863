#include "core/models/minicpm_v/minicpm_v.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"
#include "core/language/decoder.h"
#include "core/models/config_fields.h"
#include "core/projector/resampler.h"
#include "core/vision/patch_grid.h"
#include "core/vision/vit.h"

namespace martlet {
namespace minicpm_v {
namespace {

using nlohmann::json;

constexpr const char* kText = "llm.model.";
constexpr const char* kVision = "vpm.";
constexpr const char* kProjector = "resampler.";

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

// One model_type stands for all versions; some files say no version.
std::string version_of(const json& config) {
  if (field<std::string>(config, "model_type", "") == "minicpmv4_6") return "4.6";
  const json version = config.value("version", json());
  if (version.is_string()) return version.get<std::string>();
  if (version.is_number()) {
    char text[16];
    std::snprintf(text, sizeof text, "%.1f", version.get<double>());
    return text;
  }
  if (config.contains("vision_encoder")) return "2.0";
  if (field<int64_t>(config, "query_num", 64) == 96) return "2.5";
  return config.contains("head_dim") ? "4.5" : "2.6";
}

struct Config {
  ModelInfo info;
  DecoderConfig text;
  VitConfig vision;
  ResamplerConfig resampler;
  int64_t position_side = 0;
};

// Class defaults: Qwen2Config, Qwen3Config.
DecoderConfig parse_text(const json& config, bool qwen3) {
  DecoderConfig defaults;
  defaults.vocab_size = qwen3 ? 151936 : 151666;
  defaults.hidden_size = 4096;
  defaults.intermediate_size = 22016;
  defaults.num_layers = 32;
  defaults.num_heads = 32;
  defaults.max_positions = 32768;
  if (qwen3) defaults.head_dim = 128;
  DecoderConfig c = decoder_fields(config, defaults);
  c.rope_theta = rope_fields(config, 10000.0, {"default"}, "MiniCPM-V").theta;
  c.qkv_bias = qwen3 ? field(config, "attention_bias", false) : true;
  c.output_bias = qwen3 && c.qkv_bias;
  c.qk_norm = qwen3;
  c.tie_word_embeddings = field(config, "tie_word_embeddings", false);
  if (field(config, "use_sliding_window", false)) {
    fail(code::kUnsupportedModel, "config.json: use_sliding_window is not supported for MiniCPM-V.",
         {{"field", "use_sliding_window"}});
  }
  return c;
}

Config parse_config(const json& config) {
  const std::string version = version_of(config);
  if (version != "2.6" && version != "4.5") {
    fail(code::kUnsupportedModel,
         "config.json is of MiniCPM-V " + version + ", which is not supported. Supported: 2.6 and 4.5.",
         {{"version", version}, {"supported", {"2.6", "4.5"}}});
  }
  Config c;
  c.text = parse_text(config, version == "4.5");
  // Class defaults: SiglipVisionConfig of the remote code, and its so400m where nothing is said at all.
  json vision = section(config, "vision_config");
  if (vision.empty()) {
    vision = {{"hidden_size", 1152},     {"image_size", 980},         {"intermediate_size", 4304},
              {"num_hidden_layers", 27}, {"num_attention_heads", 16}, {"patch_size", 14}};
  }
  VitConfig& tower = c.vision;
  tower.hidden_size = field<int64_t>(vision, "hidden_size", 768);
  tower.intermediate_size = field<int64_t>(vision, "intermediate_size", 3072);
  tower.num_layers = field<int64_t>(vision, "num_hidden_layers", 12);
  tower.num_heads = field<int64_t>(vision, "num_attention_heads", 12);
  const int64_t patch = field<int64_t>(vision, "patch_size", 16);
  const int64_t image = field<int64_t>(vision, "image_size", 224);
  check_positive(tower.hidden_size, "vision_config.hidden_size");
  check_positive(tower.intermediate_size, "vision_config.intermediate_size");
  check_positive(tower.num_layers, "vision_config.num_hidden_layers");
  check_positive(tower.num_heads, "vision_config.num_attention_heads");
  if (patch < 1 || patch > 1024 || image < patch || image > (1 << 15) || tower.hidden_size % tower.num_heads != 0 ||
      field<int64_t>(vision, "num_channels", 3) != 3) {
    fail(code::kUnsupportedModel, "config.json: vision_config has sizes that do not fit together.",
         {{"field", "vision_config"}});
  }
  // The last layer is left out of the model then, and of its files. (The class default; published files say false.)
  if (field(config, "drop_vision_last_layer", true)) --tower.num_layers;
  c.position_side = image / patch;
  tower.patch_elements = 3 * patch * patch;
  tower.patch_bias = true;
  tower.class_token = false;
  tower.positions = VitConfig::Positions::kSampledTable;
  tower.position_rows = c.position_side * c.position_side;
  tower.embedding_norm = false;
  tower.norm_eps = field(vision, "layer_norm_eps", 1e-6);
  tower.activation = parse_activation(field<std::string>(vision, "hidden_act", "gelu_pytorch_tanh"));

  ResamplerConfig& resampler = c.resampler;
  resampler.queries = field<int64_t>(config, "query_num", 64);
  resampler.embed_dim = c.text.hidden_size;
  resampler.vision_dim = tower.hidden_size;
  resampler.num_heads = resampler.embed_dim / 128;
  check_positive(resampler.queries, "query_num");
  if (resampler.embed_dim % 128 != 0) {
    fail(code::kUnsupportedModel, "config.json: hidden_size must be a multiple of 128, the resampler's head size.",
         {{"field", "hidden_size"}});
  }
  c.info.model_type = "minicpmv";
  c.info.family = "minicpm_v";
  c.info.vocab_size = c.text.vocab_size;
  c.info.max_positions = c.text.max_positions;
  c.info.embedding_key = "llm.model.embed_tokens.weight";
  c.info.head_key = "llm.lm_head.weight";
  c.info.image_token_id = field<int64_t>(config, "image_token_id", 128244);  // <unk>
  return c;
}

// The names are those of the files.
std::string canonical_key(const std::string& key) { return key; }

bool is_unused_key(const json&, const std::string& key) {
  // Buffers that some versions saved; the positions are computed here.
  return key.find(".inv_freq") != std::string::npos || key == "resampler.pos_embed" ||
         key == "vpm.embeddings.position_ids";
}

class MiniCpmV : public VisionLanguageModel {
 public:
  MiniCpmV(const Config& config, bool own_head)
      : config_(config),
        llm_(config.text),
        vpm_(config.vision),
        post_layernorm_(config.vision.hidden_size, config.vision.norm_eps),
        resampler_(config.resampler) {
    register_module(llm_, "llm.model");
    if (own_head) {
      lm_head_.emplace(config.text.hidden_size, config.text.vocab_size, false);
      register_module(*lm_head_, "llm.lm_head");
    }
    register_module(vpm_, "vpm");
    register_module(post_layernorm_, "vpm.post_layernorm");
    register_module(resampler_, "resampler");
  }

  const ModelInfo& info() const override { return config_.info; }

  Part part_of(const std::string& path) const override {
    if (starts_with(path, kVision)) return Part::kVision;
    return starts_with(path, kProjector) ? Part::kProjector : Part::kLanguage;
  }

  bool is_default_target(const std::string& path) const override { return starts_with(path, kText); }

  VisionFeatures image_features(const std::vector<Picture>& pictures, const ForwardOptions& options) const override {
    const at::TensorOptions target = vpm_.options();
    std::vector<at::Tensor> pixels, table_rows, positions;
    std::vector<int64_t> lengths;
    for (const Picture& picture : pictures) {
      pixels.push_back(checked(picture.on(target.device()), picture.grid));
      lengths.push_back(picture.grid.patches());
      table_rows.push_back(bucketed_positions(picture.grid, config_.position_side));
      positions.push_back(sincos_positions(picture.grid, config_.resampler.embed_dim));
    }
    VitLayout layout;
    layout.rows = SequenceLengths::from_lengths(lengths, target.device());
    layout.position_index = at::cat(table_rows).unsqueeze(1).to(target.device());
    layout.position_weight = at::ones(layout.position_index.sizes(), target.dtype(at::kFloat));
    const at::Tensor seen = vpm_.forward(at::cat(pixels).to(target), layout, {config_.vision.num_layers}, options)[0];
    return {resampler_.forward(post_layernorm_.forward(seen), layout.rows, at::cat(positions).to(target.device()),
                               options.dropout),
            {}};
  }

  int64_t feature_tokens(const Picture&) const override { return config_.resampler.queries; }

  const LanguageModel& language_model() const override { return llm_; }
  const at::Tensor& head_weight() const override {
    return lm_head_ ? lm_head_->weight.value : llm_.embed_tokens.weight.value;
  }

 private:
  const at::Tensor& checked(const at::Tensor& pixels, const PatchGrid& grid) const {
    if (pixels.dim() == 2 && pixels.size(1) == config_.vision.patch_elements && grid.patches() > 0 && grid.t == 1 &&
        grid.patches() == pixels.size(0))
      return pixels;
    fail(code::kImage, "The processor made a picture of shape " + json(pixels.sizes().vec()).dump() +
                           ", but the vision tower takes patches of " + std::to_string(config_.vision.patch_elements) +
                           " numbers: preprocessor_config.json and config.json are not of one model.");
  }

  Config config_;
  Decoder llm_;
  std::optional<Linear> lm_head_;
  Vit vpm_;
  LayerNorm post_layernorm_;
  Resampler resampler_;
};

std::unique_ptr<VisionLanguageModel> create(const json& config, const WeightSource& stored) {
  const Config parsed = parse_config(config);
  return std::make_unique<MiniCpmV>(parsed, has_own_head(parsed.text, parsed.info, stored));
}

}  // namespace
}  // namespace minicpm_v

const Family& minicpm_v_family() {
  static const Family family = {
      "minicpm_v", {"minicpmv", "minicpmv4_6"}, minicpm_v::canonical_key, minicpm_v::is_unused_key, minicpm_v::create};
  return family;
}

}  // namespace martlet
