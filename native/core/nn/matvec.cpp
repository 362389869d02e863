#include "core/nn/matvec.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cuda/decode.h"

namespace martlet {
namespace {

using cuda::Matrix;
using cuda::Storage;

// int8: of more rows than these, decoding each weight once for all of them pays.
constexpr int64_t kInt8Rows = 2;

float number(const void* data, int64_t i, at::ScalarType dtype) {
  if (dtype == at::kFloat) return static_cast<const float*>(data)[i];
  if (dtype == at::kHalf) return static_cast<const c10::Half*>(data)[i];
  return static_cast<const c10::BFloat16*>(data)[i];
}

void store(void* data, int64_t i, at::ScalarType dtype, float value) {
  if (dtype == at::kFloat) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == at::kHalf) {
    static_cast<c10::Half*>(data)[i] = value;
  } else {
    static_cast<c10::BFloat16*>(data)[i] = value;
  }
}

// As CpuKernels::nf4_dot wants it.
at::Tensor nf4_order(const at::Tensor& x) {
  return x.view({x.size(0), -1, kNf4Block / 2, 2}).transpose(2, 3).contiguous();
}

class Product {
 public:
  Product(const at::Tensor& x, const Matrix& weight, Isa isa)
      : weight_(weight), kernels_(cpu_kernels(isa)), dtype_(x.scalar_type()), rows_(x.size(0)), columns_(x.size(1)) {
    const bool pairs = dtype_ == at::kBFloat16;
    if (pairs && weight.storage == Storage::kDense && kernels_.bf16_dot != nullptr) {
      form_ = Form::kBf16Pairs;
      x_ = x.contiguous();
    } else if (pairs && weight.storage == Storage::kNf4 && kernels_.nf4_dot != nullptr && columns_ % kNf4Block == 0) {
      form_ = Form::kNf4Blocks;
      x_ = nf4_order(x.contiguous());
    } else {
      if (weight.storage == Storage::kInt8 && rows_ <= kInt8Rows && kernels_.int8_dot != nullptr)
        form_ = Form::kInt8Codes;
      x_ = x.to(at::kFloat).contiguous();
    }
    x_data_ = x_.const_data_ptr();
    if (weight.outliers > 0) {
      const at::Tensor places =
          at::from_blob(const_cast<int64_t*>(weight.outlier_columns), {weight.outliers}, at::kLong);
      x_outliers_ = x.index_select(1, places).to(at::kFloat);
    }
  }

  // Rows [begin, end) of the weight; y: [rows of x, rows of the weight].
  void run(int64_t begin, int64_t end, void* y) const {
    std::vector<float> piece(form_ == Form::kBf16Pairs ? 0 : std::max(kPiece, columns_ / kNf4Block));
    std::array<float, kMatvecRows> sums;
    for (int64_t row = begin; row < end; ++row) {
      multiply(row, piece.data(), sums.data());
      for (int64_t r = 0; r < rows_; ++r) {
        const float bias = weight_.bias == nullptr ? 0 : number(weight_.bias, row, dtype_);
        store(y, r * weight_.rows + row, dtype_, sums[r] + bias);
      }
    }
  }

 private:
  enum class Form { kDecoded, kBf16Pairs, kInt8Codes, kNf4Blocks };

  // One row of the weight times each row of x.
  void multiply(int64_t row, float* piece, float* sums) const {
    if (form_ == Form::kBf16Pairs) {
      const auto* own = static_cast<const c10::BFloat16*>(weight_.weight) + row * columns_;
      const auto* x = static_cast<const c10::BFloat16*>(x_data_);
      for (int64_t r = 0; r < rows_; ++r) sums[r] = kernels_.bf16_dot(own, x + r * columns_, columns_);
      return;
    }
    if (form_ == Form::kNf4Blocks) {
      const int64_t blocks = columns_ / kNf4Block, first = row * blocks;
      const auto* codes = static_cast<const uint8_t*>(weight_.weight) + row * columns_ / 2;
      const auto* x = static_cast<const c10::BFloat16*>(x_data_);
      const float* scales = nf4_scales(weight_, first, blocks, piece);
      for (int64_t r = 0; r < rows_; ++r) sums[r] = kernels_.nf4_dot(codes, scales, x + r * columns_, blocks);
      return;
    }
    const auto* x = static_cast<const float*>(x_data_);
    if (form_ == Form::kInt8Codes) {
      const auto* codes = static_cast<const int8_t*>(weight_.weight) + row * columns_;
      for (int64_t r = 0; r < rows_; ++r) sums[r] = kernels_.int8_dot(codes, x + r * columns_, columns_);
    } else {
      std::fill_n(sums, rows_, 0.0f);
      for (int64_t column = 0; column < columns_; column += kPiece) {
        const int64_t n = std::min(kPiece, columns_ - column);
        const float* decoded = decode(row * columns_ + column, n, piece);
        for (int64_t r = 0; r < rows_; ++r) sums[r] += kernels_.dot(decoded, x + r * columns_ + column, n);
      }
    }
    if (weight_.storage == Storage::kInt8) {
      const float scale = static_cast<const float*>(weight_.scales)[row] / 127.0f;
      for (int64_t r = 0; r < rows_; ++r) sums[r] *= scale;
      add_outliers(row, piece, sums);
    }
  }

  // The n weights from element `begin` on, without int8's scale.
  const float* decode(int64_t begin, int64_t n, float* out) const {
    if (weight_.storage == Storage::kDense) return load_floats(kernels_, weight_.weight, begin, n, dtype_, out);
    if (weight_.storage == Storage::kInt8) {
      const auto* in = static_cast<const int8_t*>(weight_.weight) + begin;
      for (int64_t i = 0; i < n; i += kCacheLine) fetch_ahead(in + i);
      kernels_.int8(in, n, out);
    } else {
      decode_nf4(kernels_, weight_, begin, n, out);
    }
    return out;
  }

  void add_outliers(int64_t row, float* piece, float* sums) const {
    for (int64_t begin = 0; begin < weight_.outliers; begin += kPiece) {
      const int64_t n = std::min<int64_t>(kPiece, weight_.outliers - begin);
      const float* values =
          load_floats(kernels_, weight_.outlier_values, row * weight_.outliers + begin, n, dtype_, piece);
      const auto* x = x_outliers_.const_data_ptr<float>() + begin;
      for (int64_t r = 0; r < rows_; ++r) sums[r] += kernels_.dot(values, x + r * weight_.outliers, n);
    }
  }

  const Matrix& weight_;
  const CpuKernels& kernels_;
  const at::ScalarType dtype_;
  const int64_t rows_, columns_;
  Form form_ = Form::kDecoded;
  at::Tensor x_;  // [rows, columns]: bfloat16 for products of pairs, else float32
  const void* x_data_ = nullptr;
  at::Tensor x_outliers_;  // float32 [rows, outliers]
};

at::Tensor matvec(const at::Tensor& x, Matrix weight, at::IntArrayRef shape, const at::Tensor& bias, Isa isa) {
  TORCH_INTERNAL_ASSERT(x.size(0) <= kMatvecRows && x.size(1) == shape[1]);
  weight.rows = static_cast<int32_t>(shape[0]);
  weight.columns = static_cast<int32_t>(shape[1]);
  const at::Tensor own_bias = bias.defined() ? bias.contiguous() : bias;
  weight.bias = bias.defined() ? own_bias.const_data_ptr() : nullptr;
  at::Tensor y = at::empty({x.size(0), shape[0]}, x.options());
  const Product product(x, weight, isa);
  // 64 K weights are worth waking a thread.
  void* out = y.mutable_data_ptr();
  parallel_ranges(shape[0], (int64_t{1} << 16) / shape[1],
                  [&](int64_t begin, int64_t end) { product.run(begin, end, out); });
  return y;
}

bool recorded(const at::Tensor& x) { return x.defined() && x.requires_grad(); }

bool takes(const at::Tensor& x, at::ScalarType dtype, const at::Tensor& bias) {
  return x.is_cpu() && x.dim() == 2 && x.size(0) > 0 && x.size(0) <= kMatvecRows && x.scalar_type() == dtype &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         (!bias.defined() || bias.scalar_type() == dtype) &&
         !(at::GradMode::is_enabled() && (recorded(x) || recorded(bias)));
}

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

}  // namespace

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Isa isa) {
  Matrix matrix = {};
  matrix.storage = Storage::kDense;
  const at::Tensor own = weight.contiguous();
  matrix.weight = own.const_data_ptr();
  return matvec(x, matrix, weight.sizes(), bias, isa);
}

at::Tensor matvec(const at::Tensor& x, const QuantizedTensor& weight, const at::Tensor& bias, Isa isa) {
  Matrix matrix = {};
  weight.describe(matrix);
  return matvec(x, matrix, weight.sizes(), bias, isa);
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  // ATen's own kernels are better than plain C++.
  const bool own = best_isa() != Isa::kPlain && takes(x, weight.scalar_type(), bias) && weight.is_contiguous() &&
                   weight.scalar_type() != at::kFloat && !(at::GradMode::is_enabled() && recorded(weight));
  return own ? matvec(x, weight, bias) : at::linear(x, weight, optional(bias));
}

at::Tensor product(const at::Tensor& x, const QuantizedTensor& weight, const at::Tensor& bias) {
  Matrix matrix = {};
  if (takes(x, weight.dtype(), bias) && weight.describe(matrix))
    return matvec(x, matrix, weight.sizes(), bias, best_isa());
  return weight.linear(x, bias);
}

}  // namespace martlet
