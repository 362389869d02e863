// Rotary positions, half-split form (`rotate_half` of transformers). Angles are computed in float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace martlet {

struct RotaryTable {
  at::Tensor cos;  // [T, 1, d/2]
  at::Tensor sin;
};

// positions: [T] int64 on the device. cos and sin are rounded to `dtype`: that of the activations (Llama's line), or
// float32 where the rotation itself is done in float32 and its result rounded.
RotaryTable rotary_table(const at::Tensor& positions, int64_t head_dim, double theta, at::ScalarType dtype);

// Positions on several axes, [axes, T]: frequency i turns with the position on axis[i] (d/2 entries).
RotaryTable rotary_table(const at::Tensor& positions, const std::vector<int64_t>& axis, int64_t head_dim, double theta,
                         at::ScalarType dtype);

// Two axes with the same frequencies, θ^(−4i/d), rows first: the rotary positions of vision transformers (transformers'
// "axial"). positions: [2, T]. float32.
RotaryTable axial_rotary_table(const at::Tensor& positions, int64_t head_dim, double theta);

// x: [T, heads, d] → the same, rotated. Its backward is the rotation by the opposite angle.
at::Tensor apply_rotary(const at::Tensor& x, const RotaryTable& table);

// For callers with a backward of their own: out = x rotated, by the opposite angle if `inverse`. `out` may be x.
void rotate(const at::Tensor& out, const at::Tensor& x, const RotaryTable& table, bool inverse);

}  // namespace martlet
