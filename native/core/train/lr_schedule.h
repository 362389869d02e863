// Learning-rate schedules, as transformers/optimization.py defines them.
#pragma once

#include <cstdint>
#include <string>

namespace martlet {

struct LrSchedule {
  enum class Type { kLinear, kCosine, kConstant, kConstantWithWarmup };
  Type type = Type::kCosine;
  int64_t warmup_steps = 0;
  int64_t total_steps = 1;

  static Type parse(const std::string& name);
  // What the base rate is multiplied by in step `step`, counted from 0.
  double factor(int64_t step) const;
};

}  // namespace martlet
