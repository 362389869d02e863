#include "core/projector/mlp.h"

namespace martlet {

MlpProjector::MlpProjector(int64_t vision_size, int64_t text_size, Activation activation, bool bias)
    : linear_1(vision_size, text_size, bias), linear_2(text_size, text_size, bias), activation_(activation) {
  register_module(linear_1, "linear_1");
  register_module(linear_2, "linear_2");
}

at::Tensor MlpProjector::forward(const at::Tensor& features, DropoutSource* dropout) const {
  return linear_2.forward(activate(linear_1.forward(features, dropout), activation_), dropout);
}

}  // namespace martlet
