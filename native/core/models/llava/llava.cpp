#include "core/models/llava/llava.h"

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"
#include "core/models/llava/config.h"
#include "core/nn/mlp.h"

namespace martlet {
namespace llava {
namespace {

constexpr const char* kText = "model.language_model.";
constexpr const char* kVision = "model.vision_tower.";
constexpr const char* kProjector = "model.multi_modal_projector.";

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

// 4.x files: language_model.model.*, language_model.lm_head, vision_tower.vision_model.*, multi_modal_projector.*
// 4.52 to 5.5: model.language_model.*, lm_head, model.vision_tower.vision_model.*; from 5.6 on without vision_model.
std::string canonical_key(const std::string& key) {
  static const std::vector<std::pair<std::string, std::string>> prefixes = {
      {"language_model.model.", kText},
      {"language_model.lm_head.", "lm_head."},
      {"model.vision_tower.vision_model.", kVision},
      {"vision_tower.vision_model.", kVision},
      {"vision_tower.", kVision},
      {"multi_modal_projector.", kProjector},
  };
  for (const auto& [from, to] : prefixes) {
    if (starts_with(key, from)) return to + key.substr(from.size());
  }
  return key;
}

bool is_unused_key(const nlohmann::json& config, const std::string& key) {
  if (starts_with(key, std::string(kVision) + "post_layernorm.") ||
      key == std::string(kVision) + "embeddings.position_ids")
    return true;
  if (key.find(".rotary_emb.inv_freq") != std::string::npos) return true;  // a buffer that old versions saved
  const std::string layers = std::string(kVision) + "encoder.layers.";
  return starts_with(key, layers) && std::atoll(key.c_str() + layers.size()) >= parse_config(config).vision.num_layers;
}

class Llava : public VisionLanguageModel {
 public:
  explicit Llava(const Config& config, bool own_head)
      : config_(config),
        vision_tower_(config.vision),
        projector_({config.vision.hidden_size * static_cast<int64_t>(config.taps.size()), config.text.hidden_size,
                    config.text.hidden_size},
                   config.projector_activation, config.projector_bias, "linear_1", "linear_2"),
        language_model_(config.text) {
    register_module(vision_tower_, "model.vision_tower");
    register_module(projector_, "model.multi_modal_projector");
    register_module(language_model_, "model.language_model");
    if (own_head) {
      lm_head_.emplace(config.text.hidden_size, config.text.vocab_size, false);
      register_module(*lm_head_, "lm_head");
    }
  }

  const ModelInfo& info() const override { return config_.info; }

  Part part_of(const std::string& path) const override {
    if (starts_with(path, kVision)) return Part::kVision;
    if (starts_with(path, kProjector)) return Part::kProjector;
    return Part::kLanguage;
  }

  bool is_default_target(const std::string& path) const override { return starts_with(path, kText); }

  VisionFeatures image_features(const std::vector<Picture>& pictures, const ForwardOptions& options) const override {
    const int64_t size = config_.image_size, patch = config_.patch_size, grid = size / patch;
    const int64_t n = static_cast<int64_t>(pictures.size()), width = config_.vision.hidden_size;
    const at::TensorOptions target = vision_tower_.options();
    std::vector<at::Tensor> images;
    for (const Picture& picture : pictures) {
      const at::Tensor image = picture.on(target.device());
      if (image.dim() != 3 || image.size(1) != size || image.size(2) != size) {
        fail(code::kImage, "The processor made a picture of " + std::to_string(image.size(-1)) + "×" +
                               std::to_string(image.size(-2)) + " pixels, but the vision tower takes " +
                               std::to_string(size) + "×" + std::to_string(size) +
                               ": preprocessor_config.json and config.json are not of one model.");
      }
      images.push_back(image.to(target));
    }
    // [N, C, gh, p, gw, p] → [N · gh · gw, C · p · p]: the order of a convolution kernel's elements.
    const at::Tensor patches = at::cat(images)
                                   .view({n, 3, grid, patch, grid, patch})
                                   .permute({0, 2, 4, 1, 3, 5})
                                   .reshape({n * grid * grid, config_.vision.patch_elements});
    const int64_t tokens = 1 + config_.patches();
    VitLayout layout;
    layout.rows = SequenceLengths::from_lengths(std::vector<int64_t>(n, tokens), patches.device());
    std::vector<at::Tensor> states = vision_tower_.forward(patches, layout, config_.taps, options);
    for (at::Tensor& state : states) {
      state = state.view({-1, tokens, width});
      if (config_.drop_class_token) state = state.narrow(1, 1, tokens - 1);
      state = state.reshape({-1, width});
    }
    return {projector_.forward(states.size() == 1 ? states[0] : at::cat(states, -1), options.dropout), {}};
  }

  int64_t feature_tokens(const Picture&) const override {
    return config_.patches() + (config_.drop_class_token ? 0 : 1);
  }

  const LanguageModel& language_model() const override { return language_model_; }
  const at::Tensor& head_weight() const override {
    return lm_head_ ? lm_head_->weight.value : language_model_.embed_tokens.weight.value;
  }

 private:
  Config config_;
  Vit vision_tower_;
  Mlp projector_;
  Decoder language_model_;
  std::optional<Linear> lm_head_;
};

std::unique_ptr<VisionLanguageModel> create(const nlohmann::json& config, const WeightSource& stored) {
  const Config parsed = parse_config(config);
  return std::make_unique<Llava>(parsed, has_own_head(parsed.text, parsed.info, stored));
}

}  // namespace
}  // namespace llava

const Family& llava_family() {
  static const Family family = {"llava", {"llava"}, llava::canonical_key, llava::is_unused_key, llava::create};
  return family;
}

}  // namespace martlet
