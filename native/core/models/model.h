// What the trainer and the generator know of a model: three parts, a key map, where image features go. No family's name
// below this line.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "core/language/language_model.h"
#include "core/nn/checkpoint.h"
#include "core/nn/module.h"
#include "core/vision/image_ops.h"

namespace martlet {

enum class Part { kVision, kProjector, kLanguage };

struct ModelInfo {
  std::string model_type;  // config.json's
  std::string family;
  int64_t vocab_size = 0;
  int64_t max_positions = 0;  // 0: no limit
  int64_t image_token_id = -1;
  int64_t video_token_id = -1;  // −1: no videos
  // Encoder-decoder: what the decoder begins with. Its labels are then apart from input_ids, which the encoder reads.
  int64_t decoder_start_id = -1;
  // freeze_aligner: false trains the projector as a whole, beside LoRA pairs elsewhere, unless targets name its
  // modules.
  bool whole_projector = false;
  bool has_dropout = false;  // of its own, in training
  // Canonical names of the two weights that may be one.
  std::string embedding_key = "model.language_model.embed_tokens.weight", head_key = "lm_head.weight";
  // The output layer's module: adapters leave it as it is.
  bool is_head(const std::string& path) const { return path + ".weight" == head_key; }
  bool is_placeholder(int64_t id) const { return id == image_token_id || id == video_token_id; }
  bool is_encoder_decoder() const { return decoder_start_id >= 0; }
};

// Where the tokens of one row stand.
struct RowPositions {
  std::vector<std::vector<int64_t>> axes;  // for each axis of the decoder's rotary positions, one for each token
  int64_t next = 0;                        // of the token after the row, on all axes
};

class VisionLanguageModel : public Module {
 public:
  virtual const ModelInfo& info() const = 0;
  virtual Part part_of(const std::string& module_path) const = 0;
  // Modules that `all-linear` means: the language model's linears without the head (ms-swift).
  virtual bool is_default_target(const std::string& module_path) const = 0;

  virtual VisionFeatures image_features(const std::vector<Picture>& pictures, const ForwardOptions& options) const = 0;
  // How many tokens of image_features are one picture's.
  virtual int64_t feature_tokens(const Picture& picture) const = 0;
  // One axis, counted from 0, unless a family says otherwise. Placeholders that do not fit the pictures are
  // ERR_MARTLET_IMAGE naming the row `id`.
  virtual RowPositions positions(const std::vector<int64_t>& input_ids, const std::vector<Picture>& pictures,
                                 const std::string& id) const;
  virtual const LanguageModel& language_model() const = 0;
  // [vocab, hidden]
  virtual const at::Tensor& head_weight() const = 0;
  bool has_tied_head() const { return &head_weight() == &language_model().embed_tokens.weight.value; }
  // Parameters that float16 is too narrow for: they stay float32 in a float16 model, and are never quantised
  // (transformers' _keep_in_fp32_modules).
  virtual bool keeps_float32(const std::string&) const { return false; }
};

// transformers 5: the head is the embedding if the config says so, unless the file holds both and they differ.
bool has_own_head(const TextConfig& text, const ModelInfo& info, const WeightSource& stored);

// Of all that a picture's features follow from beside the picture: the weights in front of the language model as they
// are on the device, the config, the kind of device and libtorch's version.
std::string feature_fingerprint(VisionLanguageModel& model, const nlohmann::json& config, at::Device device);

struct Family {
  const char* name;
  std::vector<std::string> model_types;
  // Any known spelling of a weight key (4.x, 5.x) → the name in this program (transformers 5's module path).
  std::string (*canonical_key)(const std::string& key);
  // Keys that a checkpoint may hold and the model never reads.
  bool (*is_unused_key)(const nlohmann::json& config, const std::string& canonical);
  // `stored`: the checkpoint's tensors by canonical name.
  std::unique_ptr<VisionLanguageModel> (*create)(const nlohmann::json& config, const WeightSource& stored);
};

}  // namespace martlet
