#include "core/base/error.h"

#include <c10/util/Exception.h>

#include <filesystem>
#include <new>
#include <nlohmann/json.hpp>

namespace martlet {

void fail(const char* code, std::string message, const nlohmann::json& details) {
  throw Error(code, std::move(message), details.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}
void fail(const char* code, std::string message) { throw Error(code, std::move(message)); }

namespace {

constexpr const char* kMemoryRemedy =
    " Use a smaller batch or shorter rows, gradient_checkpointing: true, dtype bfloat16, or the CPU.";

// c10's message begins «CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of … of which 1.2
// GiB is free.»
std::string first_sentences(const std::string& message) {
  const size_t end = message.find(" Including non-PyTorch");
  return message.substr(0, std::min(end, message.find('\n')));
}

}  // namespace

Error current_exception_as_error() {
  try {
    throw;
  } catch (const Error& e) {
    return e;
  } catch (const c10::OutOfMemoryError& e) {
    return Error(code::kOutOfMemory, first_sentences(e.what_without_backtrace()) + kMemoryRemedy,
                 nlohmann::json{{"message", e.what_without_backtrace()}}.dump());
  } catch (const c10::Error& e) {
    const std::string message = e.what_without_backtrace();
    // The CPU allocator raises a plain c10::Error.
    if (message.find("can't allocate memory") != std::string::npos ||
        message.find("not enough memory") != std::string::npos) {
      return Error(code::kOutOfMemory, message + kMemoryRemedy, nlohmann::json{{"message", message}}.dump());
    }
    return Error(code::kInternal, "libtorch: " + message);
  } catch (const std::bad_alloc&) {
    return Error(code::kOutOfMemory, std::string("The process is out of memory.") + kMemoryRemedy);
  } catch (const nlohmann::json::exception& e) {
    return Error(code::kInternal, std::string("A job's arguments could not be read: ") + e.what());
  } catch (const std::filesystem::filesystem_error& e) {
    return Error(code::kIo, e.code().message() + ": " + e.path1().string() + ".",
                 nlohmann::json{{"path", e.path1().string()}}.dump());
  } catch (const std::exception& e) {
    return Error(code::kInternal, e.what());
  } catch (...) {
    return Error(code::kInternal, "An unknown error was thrown.");
  }
}

}  // namespace martlet
