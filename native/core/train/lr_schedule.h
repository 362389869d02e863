// Learning-rate schedules, as transformers/optimization.py defines them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace martlet {

struct LrSchedule {
  enum class Type {
    kLinear,
    kCosine,
    kCosineWithRestarts,
    kCosineWithMinLr,
    kConstant,
    kConstantWithWarmup,
    kPolynomial,
    kInverseSqrt,
  };
  Type type = Type::kCosine;
  int64_t warmup_steps = 0;
  int64_t total_steps = 1;
  // lr_scheduler_kwargs; absent = transformers' default.
  std::optional<double> num_cycles;  // waves of a cosine: 0.5; hard restarts: 1
  double min_lr_rate = 0;            // cosine_with_min_lr: lowest rate as a share of the base rate
  double end_rate = 0;               // polynomial: lr_end as a share of the base rate
  double power = 1;                  // polynomial
  std::optional<int64_t> timescale;  // inverse_sqrt: warmup_steps, or 10,000 without warm-up

  static Type parse(const std::string& name);
  // What the base rate is multiplied by in step `step`, counted from 0.
  double factor(int64_t step) const;
};

}  // namespace martlet
