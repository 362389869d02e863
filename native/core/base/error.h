// Errors of the core: one exception type that carries a stable code, a message with the remedy, and facts as JSON.
#pragma once

#include <exception>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>

namespace martlet {

// The codes of lib/errors.ts that native code raises.
namespace code {
inline constexpr const char* kConfig = "ERR_MARTLET_CONFIG";
inline constexpr const char* kUsage = "ERR_MARTLET_USAGE";
inline constexpr const char* kUnsupportedModel = "ERR_MARTLET_UNSUPPORTED_MODEL";
inline constexpr const char* kModelNotFound = "ERR_MARTLET_MODEL_NOT_FOUND";
inline constexpr const char* kWeights = "ERR_MARTLET_WEIGHTS";
inline constexpr const char* kAdapter = "ERR_MARTLET_ADAPTER";
inline constexpr const char* kImage = "ERR_MARTLET_IMAGE";
inline constexpr const char* kCudaUnavailable = "ERR_MARTLET_CUDA_UNAVAILABLE";
inline constexpr const char* kOutOfMemory = "ERR_MARTLET_OUT_OF_MEMORY";
inline constexpr const char* kNonFinite = "ERR_MARTLET_NON_FINITE";
inline constexpr const char* kDisposed = "ERR_MARTLET_DISPOSED";
inline constexpr const char* kAborted = "ERR_MARTLET_ABORTED";
inline constexpr const char* kIo = "ERR_MARTLET_IO";
inline constexpr const char* kInternal = "ERR_MARTLET_INTERNAL";
}  // namespace code

class Error : public std::exception {
 public:
  // `details_json` is a JSON object as text, so that this header needs no JSON library.
  Error(const char* code, std::string message, std::string details_json = "{}")
      : code_(code), message_(std::move(message)), details_json_(std::move(details_json)) {}

  const char* what() const noexcept override { return message_.c_str(); }
  const std::string& code() const { return code_; }
  const std::string& details_json() const { return details_json_; }

 private:
  std::string code_;
  std::string message_;
  std::string details_json_;
};

// Builds an Error with details from a JSON object (error.cpp).
[[noreturn]] void fail(const char* code, std::string message, const nlohmann::json& details);
[[noreturn]] void fail(const char* code, std::string message);

// Turns whatever is being handled (c10::OutOfMemoryError, c10::Error, std::bad_alloc, …) into an Error. Call inside a
// catch block.
Error current_exception_as_error();

}  // namespace martlet
