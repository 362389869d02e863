// What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: a vision tower over patches of pictures of any size, a patch merger, a
// decoder whose positions have three axes (time, row, column). Arithmetic: transformers 5.17, models/qwen2_vl,
// models/qwen2_5_vl, models/qwen3_vl. A family gives its Config.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "core/language/decoder.h"
#include "core/models/model.h"
#include "core/projector/patch_merger.h"
#include "core/vision/vit.h"

namespace martlet::qwen_vl_common {

struct Config {
  ModelInfo info;
  DecoderConfig text;
  VitConfig vision;
  double vision_rope_theta = 10000.0;
  PatchMergerConfig merger;
  // Vision layers (counted from 0) whose outputs are merged as well and added after the decoder's first layers.
  std::vector<int64_t> deepstack_layers;
  PatchMergerConfig deepstack_merger;
  int64_t window = 0;  // attention windows of the tower, tokens a side; 0 = none
  // Time axis of a video: 0 = one step for each temporal patch, else this many steps a second.
  int64_t tokens_per_second = 0;
  // Each temporal patch of a video is a block of its own in the text, with time stamps between.
  bool frames_apart = false;
};

// `visual.*`, `model.*` (4.x) and `model.visual.*`, `model.language_model.*` (4.52 and later, 5.x).
std::string canonical_key(const std::string& key);
bool is_unused_key(const nlohmann::json& config, const std::string& canonical);

std::unique_ptr<VisionLanguageModel> create(Config config, const WeightSource& stored);

}  // namespace martlet::qwen_vl_common
