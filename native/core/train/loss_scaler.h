// Dynamic loss scaling for float16: torch.amp.GradScaler's rules.
#pragma once

#include <cstdint>

namespace martlet {

class LossScaler {
 public:
  // Off: the scale is 1 for good.
  explicit LossScaler(bool on) : on_(on), scale_(on ? 65536.0 : 1.0) {}

  bool on() const { return on_; }
  double scale() const { return scale_; }
  // Halves the scale after gradients that were not finite; doubles it after 2,000 steps without.
  void update(bool overflow) {
    if (!on_) return;
    if (overflow) {
      scale_ *= 0.5;
      good_steps_ = 0;
    } else if (++good_steps_ == kGrowthInterval) {
      scale_ *= 2.0;
      good_steps_ = 0;
    }
  }

  int64_t good_steps() const { return good_steps_; }
  void restore(double scale, int64_t good_steps) {
    if (!on_) return;
    scale_ = scale;
    good_steps_ = good_steps;
  }

 private:
  static constexpr int64_t kGrowthInterval = 2000;
  bool on_;
  double scale_;
  int64_t good_steps_ = 0;
};

}  // namespace martlet
