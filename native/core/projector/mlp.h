// The two-layer projector of LLaVA-1.5: linear_1, activation, linear_2.
#pragma once

#include "core/nn/activation.h"
#include "core/nn/linear.h"

namespace martlet {

class MlpProjector : public Module {
 public:
  MlpProjector(int64_t vision_size, int64_t text_size, Activation activation, bool bias);
  at::Tensor forward(const at::Tensor& features, DropoutSource* dropout) const;  // [T, vision] → [T, text]
  Linear linear_1, linear_2;

 private:
  Activation activation_;
};

}  // namespace martlet
