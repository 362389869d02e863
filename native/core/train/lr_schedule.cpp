#include "core/train/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "core/base/error.h"

namespace martlet {
namespace {

using Type = LrSchedule::Type;

constexpr std::pair<const char*, Type> kNames[] = {
    {"linear", Type::kLinear},
    {"cosine", Type::kCosine},
    {"cosine_with_restarts", Type::kCosineWithRestarts},
    {"cosine_with_min_lr", Type::kCosineWithMinLr},
    {"constant", Type::kConstant},
    {"constant_with_warmup", Type::kConstantWithWarmup},
    {"polynomial", Type::kPolynomial},
    {"inverse_sqrt", Type::kInverseSqrt},
};

}  // namespace

Type LrSchedule::parse(const std::string& name) {
  std::string known;
  for (const auto& [known_name, type] : kNames) {
    if (name == known_name) return type;
    known += (known.empty() ? "" : ", ") + std::string(known_name);
  }
  fail(code::kConfig, "lr_scheduler_type \"" + name + "\" is not supported; known are " + known + ".");
}

double LrSchedule::factor(int64_t step) const {
  if (type == Type::kConstant) return 1.0;
  if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(std::max<int64_t>(1, warmup_steps));
  const double rest = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  const double progress = static_cast<double>(step - warmup_steps) / rest;
  const auto cosine = [&](double cycles) { return 0.5 * (1.0 + std::cos(std::numbers::pi * cycles * 2.0 * progress)); };
  switch (type) {
    case Type::kLinear:
      return std::max(0.0, static_cast<double>(total_steps - step) / rest);
    case Type::kCosine:
      return std::max(0.0, cosine(num_cycles.value_or(0.5)));
    case Type::kCosineWithMinLr:
      return std::max(0.0, cosine(num_cycles.value_or(0.5)) * (1 - min_lr_rate) + min_lr_rate);
    case Type::kCosineWithRestarts:
      if (progress >= 1.0) return 0.0;
      return std::max(0.0,
                      0.5 * (1.0 + std::cos(std::numbers::pi * std::fmod(num_cycles.value_or(1) * progress, 1.0))));
    case Type::kPolynomial:
      if (step > total_steps) return end_rate;
      return (1 - end_rate) * std::pow(1 - progress, power) + end_rate;
    case Type::kInverseSqrt: {
      const double scale = static_cast<double>(timescale.value_or(warmup_steps > 0 ? warmup_steps : 10'000));
      return 1.0 / std::sqrt((static_cast<double>(step - warmup_steps) + scale) / scale);
    }
    default:
      return 1.0;
  }
}

}  // namespace martlet
