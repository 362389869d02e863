// Reading JSON files that somebody else wrote.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>

namespace martlet {

// Refuses files over 64 MB and anything that is not JSON: ERR_MARTLET_IO naming the file and the byte.
nlohmann::json read_json_file(const std::filesystem::path& path);

}  // namespace martlet
