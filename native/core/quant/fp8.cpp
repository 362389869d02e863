#include "core/quant/fp8.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/base/cuda_kernels.h"
#include "core/base/dtype.h"
#include "core/base/error.h"

namespace martlet {
namespace {

// As in cuda/fp8.cuh.
constexpr double kLeast = 1e-30;  // a row of zeros has a scale too
double largest_of(at::ScalarType type) { return type == at::kFloat8_e5m2 ? 57344 : 448; }

// The kernels are asked for by tensors of 16 bits.
const cuda::Kernels* kernels_on(const at::TensorOptions& options) {
  return options.device().is_cuda() ? cuda_kernels(at::empty({0}, options.dtype(at::kBFloat16))) : nullptr;
}

}  // namespace

bool has_fp8_products(at::Device device) {
  if (!device.is_cuda()) return true;
  const c10::DeviceGuard guard(device);
  const cuda::Kernels* kernels = kernels_on(device);
  if (kernels == nullptr) return false;
  int32_t capability = 0;
  check_cuda(kernels->compute_capability(&capability));
  return capability >= 90;
}

void require_fp8(at::Device device, at::ScalarType dtype) {
  if (!device.is_cuda() || !has_fp8_products(device)) {
    fail(code::kConfig,
         "base_dtype: fp8 needs a GPU of compute capability 9.0 or newer (Hopper) with martlet's kernels, which " +
             device.str() +
             (device.is_cuda() ? " is not, or has not: `martlet doctor` says what is there" : " is not") +
             ". Leave base_dtype out, or use another device.",
         {{"path", "base_dtype"}, {"device", device.str()}});
  }
  if (dtype != at::kBFloat16) {
    fail(code::kConfig,
         std::string("base_dtype: fp8 is for bfloat16, and this model is computed in ") + dtype_name(dtype) +
             ". Set torch_dtype: bfloat16, or leave base_dtype out.",
         {{"path", "torch_dtype"}, {"dtype", dtype_name(dtype)}});
  }
}

Fp8Rows quantize_fp8_rows(const at::Tensor& x, at::ScalarType type, const at::Tensor& factors) {
  const cuda::Kernels* kernels = cuda_kernels(x);
  if (kernels != nullptr && x.size(1) % Fp8Tensor::kExtent == 0) {
    const at::Tensor rows =
        x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.storage_offset() % 8 == 0 ? x : x.contiguous();
    Fp8Rows out = {at::empty(x.sizes(), x.options().dtype(type)),
                   at::empty({x.size(0)}, x.options().dtype(at::kFloat))};
    const cuda::Fp8Rows op = {rows.const_data_ptr(),
                              rows.stride(0),
                              factors.defined() ? factors.const_data_ptr<float>() : nullptr,
                              out.codes.mutable_data_ptr(),
                              out.scales.mutable_data_ptr<float>(),
                              rows.size(0),
                              static_cast<int32_t>(rows.size(1)),
                              cuda_type(rows.scalar_type()),
                              type == at::kFloat8_e5m2};
    check_cuda(kernels->fp8_quantize_rows(op, cuda_stream(rows)));
    return out;
  }
  at::Tensor values = x.to(at::kFloat);
  if (factors.defined()) values = values * factors;
  const at::Tensor largest = values.abs().amax(1).clamp_min_(kLeast);
  return {(values * (largest_of(type) / largest).unsqueeze(1)).to(type), largest / largest_of(type)};
}

Fp8Rows empty_fp8_rows(int64_t rows, int64_t columns, at::Device device) {
  const at::TensorOptions options(device);
  return {at::empty({rows, columns}, options.dtype(at::kFloat8_e4m3fn)), at::empty({rows}, options.dtype(at::kFloat))};
}

cuda::Fp8Codes describe(const Fp8Rows& rows, const at::Tensor& factors) {
  return {factors.defined() ? factors.const_data_ptr<float>() : nullptr, rows.codes.mutable_data_ptr(),
          rows.scales.mutable_data_ptr<float>()};
}

at::Tensor transpose_bytes(const at::Tensor& x) {
  const cuda::Kernels* kernels = kernels_on(x.options());
  if (kernels != nullptr && x.size(0) % 4 == 0 && x.size(1) % 4 == 0 && x.is_contiguous()) {
    const at::Tensor out = at::empty({x.size(1), x.size(0)}, x.options());
    check_cuda(
        kernels->transpose_bytes(x.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(1), cuda_stream(x)));
    return out;
  }
  return x.view(at::kByte).t().contiguous().view(x.scalar_type());
}

at::Tensor fp8_product(const Fp8Rows& a, const Fp8Rows& b, const at::Tensor& bias, at::ScalarType dtype) {
  if (a.codes.is_cuda()) {
    return at::_scaled_mm(a.codes, b.codes.t(), a.scales.unsqueeze(1), b.scales.unsqueeze(0),
                          bias.defined() ? std::optional(bias) : std::nullopt, /*scale_result=*/std::nullopt, dtype,
                          /*use_fast_accum=*/true);
  }
  const auto values = [](const Fp8Rows& rows) { return rows.codes.to(at::kFloat).mul_(rows.scales.unsqueeze(1)); };
  at::Tensor y = at::mm(values(a), values(b).t());
  if (bias.defined()) y.add_(bias);
  return y.to(dtype);
}

bool Fp8Tensor::fits(at::IntArrayRef shape) {
  return shape.size() == 2 && shape[0] % kExtent == 0 && shape[1] % kExtent == 0;
}

Fp8Tensor::Fp8Tensor(Fp8Rows rows, at::Tensor units, at::ScalarType dtype)
    : QuantizedTensor(rows.codes.sizes(), dtype), rows_(std::move(rows)), units_(std::move(units)) {}

QuantizedPtr Fp8Tensor::quantize(const at::Tensor& weight) {
  if (!fits(weight.sizes())) {
    fail(code::kConfig,
         "A weight in fp8 has rows and columns that are multiples of " + std::to_string(kExtent) + ", not " +
             nlohmann::json(weight.sizes().vec()).dump() + ": keep it in bfloat16.",
         {{"shape", weight.sizes().vec()}});
  }
  return std::make_shared<Fp8Tensor>(quantize_fp8_rows(weight, at::kFloat8_e4m3fn),
                                     at::ones({weight.size(1)}, weight.options().dtype(at::kFloat)),
                                     weight.scalar_type());
}

void Fp8Tensor::dequantize_to(const at::Tensor& out) const {
  // float32 temporaries of 64 MB at most.
  const int64_t step = std::max<int64_t>(1, (int64_t{16} << 20) / shape_[1]);
  for (int64_t begin = 0; begin < shape_[0]; begin += step) {
    const int64_t count = std::min(step, shape_[0] - begin);
    out.narrow(0, begin, count)
        .copy_(
            rows_.codes.narrow(0, begin, count).to(at::kFloat).mul_(rows_.scales.narrow(0, begin, count).unsqueeze(1)));
  }
}

at::Tensor Fp8Tensor::linear(const at::Tensor& x, const at::Tensor& bias) const {
  return linear(quantize_fp8_rows(x, at::kFloat8_e4m3fn), bias);
}

at::Tensor Fp8Tensor::linear(const Fp8Rows& x, const at::Tensor& bias) const {
  return fp8_product(x, rows_, bias, dtype_);
}

at::Tensor Fp8Tensor::input_gradient(const at::Tensor& dy) const {
  return input_gradient(quantize_fp8_rows(dy, kFp8Gradient, rows_.scales));
}

at::Tensor Fp8Tensor::input_gradient(const Fp8Rows& dy) const {
  // dy W is a sum over the weight's rows: their scales go into dy. Tensor cores of 8 bits want both operands along the
  // sum, so the codes are transposed each time: a second copy of the weights would take away half of what fp8 saves.
  return fp8_product(dy, {transpose_bytes(rows_.codes), units_}, at::Tensor(), dtype_);
}

std::vector<std::pair<std::string, at::Tensor>> Fp8Tensor::stored() const {
  return {{"", rows_.codes}, {"_scale", rows_.scales}};
}

}  // namespace martlet
