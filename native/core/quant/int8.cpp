#include "core/quant/int8.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/base/cpu_kernels.h"
#include "core/base/cuda_kernels.h"
#include "core/base/error.h"

namespace martlet {
namespace {

// Rows at a time: float32 temporaries of 4 MB on the CPU, of 64 MB where each call costs a launch.
int64_t rows_per_chunk(const at::Tensor& matrix) {
  return std::max<int64_t>(1, (int64_t{matrix.is_cpu() ? 1 : 16} << 20) / matrix.size(1));
}

// Columns of `weight` with outliers in rising order, or an undefined tensor.
at::Tensor find_outliers(const at::Tensor& weight) {
  const int64_t rows = weight.size(0), columns = weight.size(1), step = rows_per_chunk(weight);
  at::Tensor largest = at::zeros({columns}, weight.options().dtype(at::kFloat));
  at::Tensor squares = at::zeros({}, weight.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < rows; begin += step) {
    at::Tensor part = weight.narrow(0, begin, std::min(step, rows - begin)).to(at::kFloat, false, /*copy=*/true).abs_();
    largest = at::maximum(largest, part.amax(0));
    // By rows first: on the CPU a sum in float64 converts all that it adds up.
    squares.add_(part.square_().sum(1).sum(at::kDouble));
  }
  const double rms = std::sqrt(squares.item<double>() / static_cast<double>(weight.numel()));
  const int64_t limit = columns / 64;
  at::Tensor found = largest.gt(Int8Tensor::kOutlierThreshold * rms).nonzero().view(-1);
  if (found.numel() > limit) found = std::get<1>(largest.topk(limit));
  return found.numel() == 0 ? at::Tensor() : std::get<0>(found.sort());
}

}  // namespace

QuantizedPtr Int8Tensor::quantize(const at::Tensor& weight) {
  std::shared_ptr<Int8Tensor> out(new Int8Tensor(weight.sizes(), weight.scalar_type()));
  const int64_t rows = weight.size(0), step = rows_per_chunk(weight);
  out->outlier_columns_ = find_outliers(weight);
  if (out->outlier_columns_.defined()) out->outlier_values_ = weight.index_select(1, out->outlier_columns_);
  out->codes_ = at::empty(weight.sizes(), weight.options().dtype(at::kChar));
  out->scale_ = at::empty({rows}, weight.options().dtype(at::kFloat));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    at::Tensor part = weight.narrow(0, begin, count).to(at::kFloat, false, /*copy=*/true);
    if (out->outlier_columns_.defined()) part.index_fill_(1, out->outlier_columns_, 0);
    const at::Tensor scale = part.abs().amax(1).clamp_min_(1e-38);
    out->scale_.narrow(0, begin, count).copy_(scale);
    out->codes_.narrow(0, begin, count).copy_(part.mul_((127.0 / scale).unsqueeze(1)).round_());
  }
  return out;
}

void Int8Tensor::dequantize_to(const at::Tensor& out) const {
  const int64_t rows = shape_[0], step = rows_per_chunk(codes_);
  if (const cuda::Kernels* kernels = cuda_kernels(out)) {
    const cuda::Int8 op = {codes_.const_data_ptr<int8_t>(),
                           scale_.const_data_ptr<float>(),
                           rows,
                           static_cast<int32_t>(shape_[1]),
                           out.stride(0),
                           cuda_type(dtype_)};
    check_cuda(kernels->int8_dequantize(op, out.mutable_data_ptr(), cuda_stream(out)));
  } else if (out.is_cpu() && best_isa() != Isa::kPlain) {
    dequantize_on_cpu(out);
  } else {
    for (int64_t begin = 0; begin < rows; begin += step) {
      const int64_t count = std::min(step, rows - begin);
      const at::Tensor scale = scale_.narrow(0, begin, count).unsqueeze(1);
      out.narrow(0, begin, count).copy_(codes_.narrow(0, begin, count).to(at::kFloat).mul_(scale).mul_(1.0 / 127.0));
    }
  }
  if (outlier_columns_.defined()) out.index_copy_(1, outlier_columns_, outlier_values_);
}

void Int8Tensor::dequantize_on_cpu(const at::Tensor& out) const {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t columns = shape_[1];
  const auto* codes = codes_.const_data_ptr<int8_t>();
  const auto* scale = scale_.const_data_ptr<float>();
  void* data = out.mutable_data_ptr();
  parallel_ranges(shape_[0], kPiece * 64 / std::max<int64_t>(1, columns), [&](int64_t first, int64_t last) {
    std::array<float, kPiece> piece;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t column = 0; column < columns; column += kPiece) {
        const int64_t count = std::min(kPiece, columns - column);
        kernels.int8(codes + row * columns + column, count, piece.data());
        kernels.scale(piece.data(), count, scale[row], static_cast<float>(1.0 / 127.0));
        store_rounded(kernels, piece.data(), count, data, row * out.stride(0) + column, dtype_);
      }
    }
  });
}

bool Int8Tensor::describe(cuda::Matrix& out) const {
  out.storage = cuda::Storage::kInt8;
  out.weight = codes_.const_data_ptr();
  out.scales = scale_.const_data_ptr();
  if (!outlier_columns_.defined()) return true;
  out.outliers = static_cast<int32_t>(outlier_columns_.numel());
  out.outlier_columns = outlier_columns_.const_data_ptr<int64_t>();
  out.outlier_values = outlier_values_.const_data_ptr();
  return true;
}

std::vector<std::pair<std::string, at::Tensor>> Int8Tensor::stored() const {
  // weight_format 0: rows one after the other.
  std::vector<std::pair<std::string, at::Tensor>> out = {
      {"", codes_}, {".SCB", scale_}, {".weight_format", at::zeros({}, at::kByte)}};
  if (outlier_columns_.defined()) {
    out.emplace_back(".outlier_columns", outlier_columns_);
    out.emplace_back(".outlier_values", outlier_values_);
  }
  return out;
}

QuantizedPtr Int8Tensor::read(const std::string& name, const std::function<at::Tensor(const std::string&)>& find,
                              at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  const auto wrong = [&](const std::string& what) {
    fail(code::kWeights, "The quantised tensor " + name + " " + what + ". Download the checkpoint again.",
         {{"key", name}});
  };
  std::shared_ptr<Int8Tensor> out(new Int8Tensor(shape, dtype));
  const at::Tensor codes = find(""), scale = find(".SCB"), format = find(".weight_format");
  if (!codes.defined() || codes.scalar_type() != at::kChar || codes.sizes() != shape)
    wrong("is not int8 of the shape that config.json asks for");
  if (scale.scalar_type() != at::kFloat || scale.numel() != shape[0]) wrong("has no scale for each row");
  if (format.defined() && format.item<int64_t>() != 0)
    wrong("is stored in a layout other than rows (weight_format " + std::to_string(format.item<int64_t>()) + ")");
  out->codes_ = codes.to(device, at::kChar, false, /*copy=*/true);
  out->scale_ = scale.to(device, at::kFloat, false, /*copy=*/true).view(-1);
  const at::Tensor columns = find(".outlier_columns"), values = find(".outlier_values");
  if (columns.defined() != values.defined()) wrong("has only one half of its outlier columns");
  if (columns.defined()) {
    if (columns.scalar_type() != at::kLong || columns.numel() == 0 || values.dim() != 2 || values.size(0) != shape[0] ||
        values.size(1) != columns.numel() || columns.min().item<int64_t>() < 0 ||
        columns.max().item<int64_t>() >= shape[1])
      wrong("has outlier columns that do not fit it");
    out->outlier_columns_ = columns.to(device, at::kLong, false, /*copy=*/true);
    out->outlier_values_ = values.to(device, dtype, false, /*copy=*/true);
  }
  return out;
}

}  // namespace martlet
