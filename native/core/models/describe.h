// The sizes of a model from its config.json alone, for memory predictions. Nothing is loaded.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace martlet {

// Arguments and result: DescribeArgs and ModelDescription of lib/native/binding.ts.
nlohmann::json describe_model_json(const nlohmann::json& args);

}  // namespace martlet
