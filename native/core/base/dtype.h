// float32 | bfloat16 | float16, as configurations and results name them.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>

namespace martlet {

// ERR_MARTLET_USAGE for any other name.
at::ScalarType parse_dtype(const std::string& name);
const char* dtype_name(at::ScalarType dtype);

}  // namespace martlet
