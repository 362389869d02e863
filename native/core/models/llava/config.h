// config.json of LLaVA-1.5. Published files are sparse: what they leave out comes from transformers' class defaults.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "core/language/decoder.h"
#include "core/models/model.h"
#include "core/vision/vit.h"

namespace martlet::llava {

struct Config {
  ModelInfo info;
  DecoderConfig text;
  VitConfig vision;
  int64_t image_size = 0;  // a side
  int64_t patch_size = 0;
  // Vision layers whose outputs are used, counted from 0 = the embeddings (transformers' `vision_feature_layer` made
  // positive).
  std::vector<int64_t> taps;
  bool drop_class_token = true;  // vision_feature_select_strategy: default
  Activation projector_activation = Activation::kGelu;
  bool projector_bias = true;

  int64_t patches() const { return (image_size / patch_size) * (image_size / patch_size); }
};

Config parse_config(const nlohmann::json& config);

}  // namespace martlet::llava
