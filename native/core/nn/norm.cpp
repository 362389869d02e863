#include "core/nn/norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/base/cuda_kernels.h"
#include "core/quant/fp8.h"

namespace martlet {

std::unique_ptr<Norm> make_norm(NormType type, int64_t dim, double eps) {
  if (type == NormType::kRms) return std::make_unique<RmsNorm>(dim, eps);
  return std::make_unique<LayerNorm>(dim, eps);
}

RmsNorm::RmsNorm(int64_t dim, double eps) : eps_(eps) { register_parameter(weight, "weight", {dim}); }

namespace {

cuda::RmsNorm describe(const at::Tensor& x, const at::Tensor& weight) {
  return {x.const_data_ptr(),         weight.const_data_ptr(),
          x.numel() / x.size(-1),     static_cast<int32_t>(x.size(-1)),
          cuda_type(x.scalar_type()), x.size(-1)};
}

// Of the rows that `op` writes.
void add_codes(cuda::RmsNorm& op, Fp8Rows* codes, at::Device device) {
  if (codes == nullptr) return;
  *codes = empty_fp8_rows(op.rows, op.columns, device);
  op.y_codes = describe(*codes);
}

bool has_plain_rows(const at::Tensor& x) { return x.stride(-1) == 1 && (x.is_contiguous() || x.dim() == 2); }
int64_t row_pitch(const at::Tensor& x) { return x.is_contiguous() ? x.size(-1) : x.stride(0); }

// One kernel each way; the weight gets no gradient. `rstd`, float32 [rows], is written where it is defined.
at::Tensor rms_norm_kernel(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& rstd,
                           at::Tensor y = {}, Fp8Rows* codes = nullptr) {
  if (!y.defined()) y = at::empty_like(x);
  cuda::RmsNorm op = describe(x, weight);
  op.out_pitch = row_pitch(y);
  add_codes(op, codes, x.device());
  float* scales = rstd.defined() ? rstd.mutable_data_ptr<float>() : nullptr;
  check_cuda(cuda_kernels(x)->rms_norm(op, eps, y.mutable_data_ptr(), scales, cuda_stream(x)));
  return y;
}

struct RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            double eps) {
    const at::Tensor rstd = at::empty({x.numel() / x.size(-1)}, x.options().dtype(at::kFloat));
    ctx->save_for_backward({x, weight, rstd});
    return rms_norm_kernel(x, weight, eps, rstd);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], dy = grads[0].contiguous();
    at::Tensor dx = at::empty_like(x);
    check_cuda(cuda_kernels(x)->rms_norm_backward(describe(x, weight), dy.const_data_ptr(),
                                                  saved[2].const_data_ptr<float>(), dx.mutable_data_ptr(),
                                                  cuda_stream(x)));
    return {dx, at::Tensor(), at::Tensor()};
  }
};

// Without its weight argument the fused op rounds x̂ to x's dtype, as the original does before it multiplies.
at::Tensor plain_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return at::rms_norm(x, {x.size(-1)}, std::nullopt, eps) * weight;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const bool recorded = at::GradMode::is_enabled();
  if (cuda_kernels(x) != nullptr && x.is_contiguous() && weight.scalar_type() == x.scalar_type() &&
      !(recorded && weight.requires_grad())) {
    return recorded && x.requires_grad() ? RmsNormFunction::apply(x, weight, eps)
                                         : rms_norm_kernel(x, weight, eps, at::Tensor());
  }
  return plain_rms_norm(x, weight, eps);
}

// Null unless the kernels take x and the weight as they lie.
const cuda::Kernels* rms_norm_kernels(const at::Tensor& x, const at::Tensor& weight) {
  return x.is_contiguous() && weight.scalar_type() == x.scalar_type() ? cuda_kernels(x) : nullptr;
}

at::Tensor placed(const at::Tensor& y, at::Tensor& out, Fp8Rows* codes = nullptr) {
  if (codes != nullptr) *codes = quantize_fp8_rows(y, at::kFloat8_e4m3fn);
  return out.defined() ? out.copy_(y) : y;
}

at::Tensor empty_scales(const at::Tensor& x) {
  return at::empty({x.numel() / x.size(-1)}, x.options().dtype(at::kFloat));
}

}  // namespace

at::Tensor RmsNorm::forward(const at::Tensor& x, Scales& scales, at::Tensor out, Fp8Rows* codes) const {
  if (rms_norm_kernels(x, weight.value) == nullptr) return placed(plain_rms_norm(x, weight.value, eps_), out, codes);
  scales = empty_scales(x);
  return rms_norm_kernel(x, weight.value, eps_, scales, out, codes);
}

at::Tensor RmsNorm::add_forward(at::Tensor& sum, const at::Tensor& x, Scales& scales, at::Tensor out,
                                Fp8Rows* codes) const {
  const cuda::Kernels* kernels = x.is_contiguous() ? rms_norm_kernels(sum, weight.value) : nullptr;
  if (kernels == nullptr) return placed(plain_rms_norm(sum.add_(x), weight.value, eps_), out, codes);
  scales = empty_scales(x);
  if (!out.defined()) out = at::empty_like(x);
  cuda::RmsNorm op = describe(x, weight.value);
  op.out_pitch = row_pitch(out);
  add_codes(op, codes, x.device());
  check_cuda(kernels->add_rms_norm(op, sum.mutable_data_ptr(), eps_, out.mutable_data_ptr(),
                                   scales.mutable_data_ptr<float>(), cuda_stream(x)));
  return out;
}

at::Tensor RmsNorm::backward(const at::Tensor& x, const Scales& scales, const at::Tensor& dy) const {
  if (scales.defined() && dy.is_contiguous()) {
    at::Tensor dx = at::empty_like(x);
    check_cuda(cuda_kernels(x)->rms_norm_backward(describe(x, weight.value), dy.const_data_ptr(),
                                                  scales.const_data_ptr<float>(), dx.mutable_data_ptr(),
                                                  cuda_stream(x)));
    return dx;
  }
  // With g = dy · weight and x̂ = x · rstd: rstd · (g − x̂ · mean(g · x̂)).
  const at::Tensor wide = x.to(at::kFloat), rstd = wide.square().mean(-1, /*keepdim=*/true).add_(eps_).rsqrt_();
  const at::Tensor unit = wide * rstd, g = dy.to(at::kFloat) * weight.value.to(at::kFloat);
  return (g - unit * (g * unit).mean(-1, /*keepdim=*/true)).mul_(rstd).to(x.scalar_type());
}

at::Tensor RmsNorm::backward_add(const at::Tensor& x, const Scales& scales, at::Tensor& dy, const at::Tensor& residual,
                                 at::Tensor out) const {
  if (scales.defined() && dy.is_contiguous() && has_plain_rows(residual)) {
    if (!out.defined()) out = at::empty_like(x);
    cuda::RmsNorm op = describe(x, weight.value);
    op.out_pitch = row_pitch(out);
    op.residual_pitch = row_pitch(residual);
    check_cuda(cuda_kernels(x)->rms_norm_backward_add(op, dy.mutable_data_ptr(), scales.const_data_ptr<float>(),
                                                      residual.const_data_ptr(), out.mutable_data_ptr(),
                                                      cuda_stream(x)));
    return out;
  }
  const at::Tensor dx = backward(x, scales, dy).add_(residual);
  dy.copy_(plain_rms_norm(x, weight.value, eps_));
  return placed(dx, out);
}

at::Tensor RmsNorm::forward(const at::Tensor& x) const {
  at::Tensor y = rms_norm(x, weight.value, eps_);
  observe_output(*this, y);
  return y;
}

LayerNorm::LayerNorm(int64_t dim, double eps) : dim_(dim), eps_(eps) {
  register_parameter(weight, "weight", {dim});
  register_parameter(bias, "bias", {dim});
}

at::Tensor LayerNorm::forward(const at::Tensor& x) const {
  at::Tensor y = at::layer_norm(x, {dim_}, weight.value, bias.value, eps_);
  observe_output(*this, y);
  return y;
}

}  // namespace martlet
