// The list of families. Adding one: its folder, and one line in registry.cpp.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "core/models/model.h"

namespace martlet {

// By `model_type` of config.json; ERR_MARTLET_UNSUPPORTED_MODEL names what is there and what is supported.
const Family& family_for(const nlohmann::json& config, const std::string& model_dir);

// What config.json asks for and the family does not do is ERR_MARTLET_UNSUPPORTED_MODEL with the file's path. `stored`:
// as in Family; without it the model is built for its names alone.
std::unique_ptr<VisionLanguageModel> create_model(const Family& family, const nlohmann::json& config,
                                                  const std::string& model_dir, const WeightSource& stored = {});

}  // namespace martlet
