// What the trainer and the generator know of a model: three parts, a key map, where image features go. No family's name
// below this line.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "core/language/decoder.h"
#include "core/nn/checkpoint.h"
#include "core/nn/module.h"

namespace martlet {

enum class Part { kVision, kProjector, kLanguage };

struct ModelInfo {
  std::string model_type;  // config.json's
  std::string family;
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  int64_t image_token_id = -1;
};

class VisionLanguageModel : public Module {
 public:
  virtual const ModelInfo& info() const = 0;
  virtual Part part_of(const std::string& module_path) const = 0;
  // Modules that `all-linear` means: the language model's linears without the head (ms-swift).
  virtual bool is_default_target(const std::string& module_path) const = 0;

  // Preprocessed images ([3, H, W] float32 on the CPU) → rows for the image tokens, [image tokens, hidden], in the
  // order of the images.
  virtual at::Tensor image_features(const std::vector<at::Tensor>& images, const ForwardOptions& options) const = 0;
  virtual const Decoder& decoder() const = 0;
  // [vocab, hidden]
  virtual const at::Tensor& head_weight() const = 0;
};

struct Family {
  const char* name;
  std::vector<std::string> model_types;
  // Any known spelling of a weight key (4.x, 5.x) → the name in this program (transformers 5's module path).
  std::string (*canonical_key)(const std::string& key);
  // Keys that a checkpoint may hold and the model never reads.
  bool (*is_unused_key)(const nlohmann::json& config, const std::string& canonical);
  // `has_key` tells whether the checkpoint holds a canonical name (a tied head may be left out).
  std::unique_ptr<VisionLanguageModel> (*create)(const nlohmann::json& config,
                                                 const std::function<bool(const std::string&)>& has_key);
};

}  // namespace martlet
