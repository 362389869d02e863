#include "core/base/json.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/base/error.h"

namespace martlet {

nlohmann::json read_json_file(const std::filesystem::path& path) {
  constexpr std::uintmax_t kLimit = 64u << 20;
  std::error_code ec;
  const std::uintmax_t size = std::filesystem::file_size(path, ec);
  if (ec) fail(code::kIo, "Cannot read " + path.string() + ": " + ec.message() + ".", {{"path", path.string()}});
  if (size > kLimit)
    fail(code::kIo, path.string() + " is larger than 64 MB; it is not a configuration file.",
         {{"path", path.string()}});
  std::ifstream stream(path, std::ios::binary);
  std::stringstream text;
  text << stream.rdbuf();
  if (!stream)
    fail(code::kIo, "Cannot read " + path.string() + ": " + std::strerror(errno) + ".", {{"path", path.string()}});
  try {
    return nlohmann::json::parse(text.str());
  } catch (const nlohmann::json::parse_error& e) {
    fail(code::kIo,
         path.string() + " is not valid JSON (at byte " + std::to_string(e.byte) + "). Download the file again.",
         {{"path", path.string()}, {"byte", e.byte}});
  }
}

}  // namespace martlet
