#include "core/nn/rope.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/base/cuda_kernels.h"

namespace martlet {

namespace {

// θ^(−2i/dim), [dim/2] float32
at::Tensor inverse_frequencies(int64_t dim, double theta, at::Device device) {
  const auto f32 = at::TensorOptions().dtype(at::kFloat).device(device);
  return at::pow(theta, at::arange(0, dim, 2, f32) / static_cast<double>(dim)).reciprocal();
}

// angle: [T, d/2]
RotaryTable from_angles(const at::Tensor& angle, at::ScalarType dtype) {
  // Rows one after the other, as the kernel reads them; the angles of several axes come transposed.
  const at::Tensor each_head = angle.contiguous().unsqueeze(1);
  return {each_head.cos().to(dtype), each_head.sin().to(dtype)};
}

}  // namespace

RotaryTable rotary_table(const at::Tensor& positions, int64_t head_dim, double theta, at::ScalarType dtype) {
  const at::Tensor inv_freq = inverse_frequencies(head_dim, theta, positions.device());
  return from_angles(positions.to(at::kFloat).unsqueeze(-1) * inv_freq, dtype);
}

RotaryTable rotary_table(const at::Tensor& positions, const std::vector<int64_t>& axis, int64_t head_dim, double theta,
                         at::ScalarType dtype) {
  const at::Tensor inv_freq = inverse_frequencies(head_dim, theta, positions.device());
  const at::Tensor rows = at::tensor(axis, at::kLong).to(positions.device());
  return from_angles(positions.to(at::kFloat).index_select(0, rows).t() * inv_freq, dtype);
}

RotaryTable axial_rotary_table(const at::Tensor& positions, int64_t head_dim, double theta) {
  const at::Tensor inv_freq = inverse_frequencies(head_dim / 2, theta, positions.device());
  return from_angles((positions.to(at::kFloat).unsqueeze(-1) * inv_freq).permute({1, 0, 2}).flatten(1), at::kFloat);
}

void rotate(const at::Tensor& out, const at::Tensor& x, const RotaryTable& table, bool inverse) {
  const at::Tensor &cos = table.cos, &sin = table.sin;
  const int64_t half = x.size(-1) / 2;
  if (const cuda::Kernels* kernels = cuda_kernels(x); kernels != nullptr && x.stride(-1) == 1 && out.stride(-1) == 1 &&
                                                      cos.is_contiguous() && sin.is_contiguous() &&
                                                      x.numel() / 2 < int64_t{1} << 31) {
    cuda::Rotary op = {};
    op.x = x.const_data_ptr();
    op.cos = cos.const_data_ptr();
    op.sin = sin.const_data_ptr();
    op.out = out.mutable_data_ptr();
    op.tokens = x.size(0);
    op.token_stride = x.stride(0);
    op.head_stride = x.stride(1);
    op.out_token_stride = out.stride(0);
    op.out_head_stride = out.stride(1);
    op.heads = static_cast<int32_t>(x.size(1));
    op.head_dim = static_cast<int32_t>(x.size(2));
    op.type = cuda_type(x.scalar_type());
    op.float_table = cos.scalar_type() == at::kFloat;
    op.inverse = inverse;
    check_cuda(kernels->rotary(op, cuda_stream(x)));
    return;
  }
  const at::Tensor x1 = x.narrow(-1, 0, half), x2 = x.narrow(-1, half, half);
  at::Tensor o1 = out.narrow(-1, 0, half), o2 = out.narrow(-1, half, half);
  const at::Tensor s = inverse ? sin.neg() : sin;
  // Each product is rounded to the dtype (of x and the table together) before the sum, as in the original. All four
  // before the first sum: out may be x.
  const at::Tensor c1 = x1 * cos, s2 = x2 * s, c2 = x2 * cos, s1 = x1 * s;
  at::sub_out(o1, c1, s2);
  at::add_out(o2, c2, s1);
}

namespace {

at::Tensor rotated(const at::Tensor& x, const RotaryTable& table, bool inverse) {
  at::Tensor out = at::empty(x.sizes(), x.options());
  rotate(out, x, table, inverse);
  return out;
}

struct RotaryFunction : public torch::autograd::Function<RotaryFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotated(x, {cos, sin}, /*inverse=*/false);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {rotated(grads[0], {saved[0], saved[1]}, /*inverse=*/true), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor apply_rotary(const at::Tensor& x, const RotaryTable& table) {
  if (!(x.requires_grad() && at::GradMode::is_enabled())) return rotated(x, table, /*inverse=*/false);
  return RotaryFunction::apply(x, table.cos, table.sin);
}

}  // namespace martlet
