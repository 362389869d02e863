// Reading a config.json that may be sparse, and of any transformers version.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/base/error.h"
#include "core/language/decoder.h"

namespace martlet {

// A field with its class default; null counts as absent. Another type is ERR_MARTLET_UNSUPPORTED_MODEL.
template <typename T>
T field(const nlohmann::json& object, const char* key, T fallback) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return fallback;
  try {
    return it->get<T>();
  } catch (const nlohmann::json::exception&) {
    fail(code::kUnsupportedModel,
         std::string("config.json: \"") + key + "\" is " + it->dump() + ", which is not of the expected type.",
         {{"field", key}});
  }
}

// An object, empty when absent.
nlohmann::json section(const nlohmann::json& config, const char* key);

// `model_type` of a part, where it is given, must be one of `expected`.
void require_type(const nlohmann::json& part, const char* what, const std::vector<std::string>& expected,
                  const char* model);

// Sizes far above any published one, or below 1, are ERR_MARTLET_UNSUPPORTED_MODEL.
void check_positive(int64_t value, const char* key);

// The fields that every decoder has, over the class defaults in `defaults` (head_dim 0 = hidden / heads). The MLP must
// have silu.
DecoderConfig decoder_fields(const nlohmann::json& text, DecoderConfig defaults);

// 4.x: rope_theta + rope_scaling {type | rope_type, …}; 5.x: rope_parameters {rope_theta, rope_type, …}.
struct RopeFields {
  double theta = 0;
  nlohmann::json parameters;  // what else is given
};
// A type that is not among `types` is ERR_MARTLET_UNSUPPORTED_MODEL naming it.
RopeFields rope_fields(const nlohmann::json& text, double default_theta, const std::vector<std::string>& types,
                       const char* model);

}  // namespace martlet
