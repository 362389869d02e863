#include "core/base/error.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <filesystem>
#include <new>
#include <nlohmann/json.hpp>

namespace martlet {

void fail(const char* code, std::string message, const nlohmann::json& details) {
  throw Error(code, std::move(message), details.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}
void fail(const char* code, std::string message) { throw Error(code, std::move(message)); }

namespace {

// Bytes of a size such as «2.00 GiB» that follows `label`; 0 when it is not there.
int64_t size_after(const std::string& message, const std::string& label) {
  const size_t at = message.find(label);
  if (at == std::string::npos) return 0;
  double value = 0;
  char unit[8] = "";
  if (std::sscanf(message.c_str() + at + label.size(), " %lf %7[A-Za-z]", &value, unit) != 2) return 0;
  const std::string name = unit;
  const int shift = name == "GiB" ? 30 : name == "MiB" ? 20 : name == "KiB" ? 10 : 0;
  return static_cast<int64_t>(value * static_cast<double>(int64_t{1} << shift));
}

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
    const std::string message = e.what_without_backtrace();
    return Error(code::kOutOfMemory, first_sentences(message) + kMemoryRemedy,
                 nlohmann::json{{"requested", size_after(message, "Tried to allocate")},
                                {"free", size_after(message, "of which")},
                                {"message", message}}
                     .dump());
  } catch (const c10::Error& e) {
    const std::string message = e.what_without_backtrace();
    // The CPU allocator raises a plain c10::Error; so do CUDA libraries that allocate for themselves.
    if (message.find("can't allocate memory") != std::string::npos ||
        message.find("out of memory") != std::string::npos || message.find("ALLOC_FAILED") != std::string::npos ||
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
