// config.json of BLIP-2. Published files are sparse: what they leave out comes from transformers' class defaults.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <variant>

#include "core/language/decoder.h"
#include "core/language/t5.h"
#include "core/models/model.h"
#include "core/projector/q_former.h"
#include "core/vision/vit.h"

namespace martlet::blip2 {

struct Config {
  ModelInfo info;
  std::variant<DecoderConfig, T5Config> text;  // OPT, T5
  VitConfig vision;
  int64_t image_size = 0;  // a side
  int64_t patch_size = 0;
  QFormerConfig q_former;
  int64_t query_tokens = 32;

  const TextConfig& text_sizes() const {
    return std::visit([](const auto& text) -> const TextConfig& { return text; }, text);
  }
};

Config parse_config(const nlohmann::json& config);

}  // namespace martlet::blip2
