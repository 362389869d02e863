#include "core/base/dtype.h"

#include "core/base/error.h"

namespace martlet {

at::ScalarType parse_dtype(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  fail(code::kUsage, "dtype \"" + name + "\" is not known; use auto, float32, bfloat16 or float16.");
}

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
}

}  // namespace martlet
