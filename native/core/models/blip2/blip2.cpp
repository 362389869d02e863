#include "core/models/blip2/blip2.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"
#include "core/models/blip2/config.h"
#include "core/vision/patch_grid.h"

namespace martlet {
namespace blip2 {
namespace {

using nlohmann::json;

constexpr const char* kVision = "vision_model";
constexpr const char* kText = "language_model";

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

// The names are those of the files, in every version. T5's stacks may repeat the embedding.
std::string canonical_key(const std::string& key) {
  if (key == "language_model.encoder.embed_tokens.weight" || key == "language_model.decoder.embed_tokens.weight")
    return "language_model.shared.weight";
  return key;
}

bool is_unused_key(const json&, const std::string& key) {
  // A buffer that old versions saved; a table that old T5 files hold and no layer reads.
  return key == "qformer.embeddings.position_ids" ||
         key == "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
}

class Blip2 : public VisionLanguageModel {
 public:
  Blip2(const Config& config, bool own_head)
      : config_(config),
        vision_model_(config.vision),
        post_layernorm_(config.vision.hidden_size, config.vision.norm_eps),
        qformer_(config.q_former),
        language_projection_(config.q_former.hidden_size, config.text_sizes().hidden_size, true) {
    register_parameter(query_tokens_, "query_tokens", {config.query_tokens, config.q_former.hidden_size});
    register_module(vision_model_, "vision_model");
    register_module(post_layernorm_, "vision_model.post_layernorm");
    register_module(qformer_, "qformer");
    register_module(language_projection_, "language_projection");
    if (const auto* opt = std::get_if<DecoderConfig>(&config.text)) {
      language_model_ = std::make_unique<Decoder>(*opt);
      register_module(*language_model_, "language_model.model.decoder");
    } else {
      language_model_ = std::make_unique<T5>(std::get<T5Config>(config.text));
      register_module(*language_model_, "language_model");
    }
    if (!own_head) return;
    lm_head_.emplace(config.text_sizes().hidden_size, config.info.vocab_size, false);
    register_module(*lm_head_, "language_model.lm_head");
  }

  const ModelInfo& info() const override { return config_.info; }

  Part part_of(const std::string& path) const override {
    if (starts_with(path, kVision)) return Part::kVision;
    return starts_with(path, kText) ? Part::kLanguage : Part::kProjector;
  }

  bool is_default_target(const std::string& path) const override {
    return starts_with(path, kText) && !config_.info.is_head(path);
  }

  bool keeps_float32(const std::string& name) const override {
    return starts_with(name, "query_tokens") || starts_with(name, "qformer.") ||
           (config_.info.is_encoder_decoder() && name.find(".wo.") != std::string::npos);
  }

  VisionFeatures image_features(const std::vector<Picture>& pictures, const ForwardOptions& options) const override {
    const int64_t size = config_.image_size / config_.patch_size * config_.patch_size;
    const at::TensorOptions target = vision_model_.options();
    std::vector<at::Tensor> patches;
    for (const Picture& picture : pictures) {
      const at::Tensor image = picture.on(target.device());
      if (image.dim() != 3 || image.size(1) != config_.image_size || image.size(2) != config_.image_size) {
        fail(code::kImage, "The processor made a picture of " + std::to_string(image.size(-1)) + "×" +
                               std::to_string(image.size(-2)) + " pixels, but the vision tower takes " +
                               std::to_string(config_.image_size) + "×" + std::to_string(config_.image_size) +
                               ": preprocessor_config.json and config.json are not of one model.");
      }
      // What is left over at the edges is not seen, as in a convolution.
      const at::Tensor whole = image.narrow(1, 0, size).narrow(2, 0, size).contiguous();
      patches.push_back(cut_patches(whole.unsqueeze(0), config_.patch_size, 1, 1));
    }
    VitLayout layout;
    layout.rows = SequenceLengths::from_lengths(std::vector<int64_t>(pictures.size(), config_.vision.position_rows),
                                                target.device());
    const at::Tensor seen = post_layernorm_.forward(
        vision_model_.forward(at::cat(patches).to(target), layout, {config_.vision.num_layers}, options)[0]);
    const at::Tensor queried = qformer_.forward(query_tokens_.value, seen, layout.rows, options);
    return {language_projection_.forward(queried.to(seen.scalar_type()), options.dropout), {}};
  }

  RowPositions positions(const std::vector<int64_t>& input_ids, const std::vector<Picture>& pictures,
                         const std::string& id) const override {
    const std::string where = id.empty() ? "" : " (" + id + ")";
    const auto places =
        static_cast<int64_t>(std::count(input_ids.begin(), input_ids.end(), config_.info.image_token_id));
    const int64_t features = config_.query_tokens * static_cast<int64_t>(pictures.size());
    if (places != features) {
      fail(code::kImage,
           "The row" + where + " has " + std::to_string(places) + " image tokens, but its " +
               std::to_string(pictures.size()) + " picture(s) have " + std::to_string(features) + " query tokens (" +
               std::to_string(config_.query_tokens) + " each).",
           {{"id", id}, {"places", places}, {"features", features}});
    }
    const auto tokens = static_cast<int64_t>(input_ids.size());
    if (config_.info.max_positions > 0 && tokens > config_.info.max_positions) {
      fail(code::kConfig,
           "The row" + where + " has " + std::to_string(tokens) +
               " tokens (image tokens included), but the model has " + std::to_string(config_.info.max_positions) +
               " positions. Shorten it, or set max_length.",
           {{"id", id}, {"tokens", tokens}, {"maxPositions", config_.info.max_positions}});
    }
    return VisionLanguageModel::positions(input_ids, pictures, id);
  }

  int64_t feature_tokens(const Picture&) const override { return config_.query_tokens; }

  const LanguageModel& language_model() const override { return *language_model_; }
  const at::Tensor& head_weight() const override {
    return lm_head_ ? lm_head_->weight.value : language_model_->embed_tokens.weight.value;
  }

 private:
  Config config_;
  Parameter query_tokens_;
  Vit vision_model_;
  LayerNorm post_layernorm_;
  QFormer qformer_;
  Linear language_projection_;
  std::unique_ptr<LanguageModel> language_model_;
  std::optional<Linear> lm_head_;
};

std::unique_ptr<VisionLanguageModel> create(const json& config, const WeightSource& stored) {
  const Config parsed = parse_config(config);
  // transformers 5 ties a T5's head whatever the file's config says, unless the file holds a head.
  const bool tied = parsed.info.is_encoder_decoder() && !stored(parsed.info.head_key).defined() &&
                    stored(parsed.info.embedding_key).defined();
  return std::make_unique<Blip2>(parsed, !tied && has_own_head(parsed.text_sizes(), parsed.info, stored));
}

}  // namespace
}  // namespace blip2

const Family& blip2_family() {
  static const Family family = {"blip2", {"blip-2"}, blip2::canonical_key, blip2::is_unused_key, blip2::create};
  return family;
}

}  // namespace martlet
