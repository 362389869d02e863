#include "core/train/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/base/error.h"

namespace martlet {

LrSchedule::Type LrSchedule::parse(const std::string& name) {
  if (name == "linear") return Type::kLinear;
  if (name == "cosine") return Type::kCosine;
  if (name == "constant") return Type::kConstant;
  if (name == "constant_with_warmup") return Type::kConstantWithWarmup;
  fail(code::kConfig, "lr_scheduler_type \"" + name +
                          "\" is not supported; known are linear, cosine, constant and constant_with_warmup.");
}

double LrSchedule::factor(int64_t step) const {
  if (type == Type::kConstant) return 1.0;
  if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(std::max<int64_t>(1, warmup_steps));
  const double rest = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  switch (type) {
    case Type::kLinear:
      return std::max(0.0, static_cast<double>(total_steps - step) / rest);
    case Type::kCosine:
      return std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * static_cast<double>(step - warmup_steps) / rest)));
    default:
      return 1.0;
  }
}

}  // namespace martlet
