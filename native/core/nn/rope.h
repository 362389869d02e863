// Rotary positions, half-split form (`rotate_half` of transformers): cos and sin are computed in float32 and rounded to
// the activations' dtype.
#pragma once

#include <ATen/core/Tensor.h>

namespace martlet {

struct RotaryTable {
  at::Tensor cos;  // [T, 1, d/2] in the activations' dtype
  at::Tensor sin;
};

// positions: [T] int64 on the device.
RotaryTable rotary_table(const at::Tensor& positions, int64_t head_dim, double theta, at::ScalarType dtype);

// x: [T, heads, d] → the same, rotated. Its backward is the rotation by the opposite angle.
at::Tensor apply_rotary(const at::Tensor& x, const RotaryTable& table);

}  // namespace martlet
