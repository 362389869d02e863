#include "core/models/llava/llava.h"

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"
#include "core/models/llava/config.h"
#include "core/projector/mlp.h"

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
        projector_(config.vision.hidden_size * static_cast<int64_t>(config.taps.size()), config.text.hidden_size,
                   config.projector_activation, config.projector_bias),
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

  at::Tensor image_features(const std::vector<at::Tensor>& images, const ForwardOptions& options) const override {
    const int64_t size = config_.vision.image_size;
    for (const at::Tensor& image : images) {
      if (image.size(1) != size || image.size(2) != size) {
        fail(code::kImage, "The processor made a picture of " + std::to_string(image.size(2)) + "×" +
                               std::to_string(image.size(1)) + " pixels, but the vision tower takes " +
                               std::to_string(size) + "×" + std::to_string(size) +
                               ": preprocessor_config.json and config.json are not of one model.");
      }
    }
    const at::Tensor& like = projector_.linear_1.weight.value;
    const at::Tensor pixels = at::stack(images).to(like.device(), like.scalar_type());
    std::vector<at::Tensor> states = vision_tower_.forward(pixels, config_.taps, options);
    const int64_t width = config_.vision.hidden_size, tokens = 1 + config_.vision.patches();
    for (at::Tensor& state : states) {
      state = state.view({-1, tokens, width});
      if (config_.drop_class_token) state = state.narrow(1, 1, tokens - 1);
      state = state.reshape({-1, width});
    }
    return projector_.forward(states.size() == 1 ? states[0] : at::cat(states, -1), options.dropout);
  }

  const Decoder& decoder() const override { return language_model_; }
  const at::Tensor& head_weight() const override {
    return lm_head_ ? lm_head_->weight.value : language_model_.embed_tokens.weight.value;
  }

 private:
  Config config_;
  Vit vision_tower_;
  MlpProjector projector_;
  Decoder language_model_;
  std::optional<Linear> lm_head_;
};

std::unique_ptr<VisionLanguageModel> create(const nlohmann::json& config,
                                            const std::function<bool(const std::string&)>& has_key) {
  const Config parsed = parse_config(config);
  // transformers 5: tied only if the config says so; a head that is in the file is kept all the same.
  const bool own_head = !parsed.text.tie_word_embeddings || has_key("lm_head.weight");
  return std::make_unique<Llava>(parsed, own_head);
}

}  // namespace
}  // namespace llava

const Family& llava_family() {
  static const Family family = {"llava", {"llava"}, llava::canonical_key, llava::is_unused_key, llava::create};
  return family;
}

}  // namespace martlet
