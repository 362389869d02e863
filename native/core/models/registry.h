// The list of families. Adding one: its folder, and one line in registry.cpp.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "core/models/model.h"

namespace martlet {

// By `model_type` of config.json; ERR_MARTLET_UNSUPPORTED_MODEL names what is there and what is supported.
const Family& family_for(const nlohmann::json& config, const std::string& model_dir);

}  // namespace martlet
