// fp8 by rows: each row of a frozen weight as e4m3 numbers times one float32. On a GPU of Hopper or newer the products
// themselves are of 8 bits: the rows of x and of the gradient become e4m3 as they come, each with a scale of its own
// (formats: Micikevicius et al. 2022, "FP8 Formats for Deep Learning").
#pragma once

#include "core/quant/quantized_tensor.h"
#include "cuda/kernels.h"

namespace martlet {

// Whether fp8_product() runs there: the CPU, or a GPU of Hopper or newer with the kernels of native/cuda.
bool has_fp8_products(at::Device device);
// What a run in fp8 asks for: has_fp8_products() and a GPU (the CPU's products serve the tests), and `dtype`, the one
// to compute in, bfloat16. Else ERR_MARTLET_CONFIG.
void require_fp8(at::Device device, at::ScalarType dtype);

// What gradients become. A scale for each row spans what e5m2's wider range is for (2^17 within a row), and e4m3 has a
// bit more: a product's gradient is 3.7 % from the exact one, 5.9 % with e5m2.
constexpr at::ScalarType kFp8Gradient = at::kFloat8_e4m3fn;

// Rows times what their largest magnitude needs to be the largest number of the 8-bit type.
struct Fp8Rows {
  at::Tensor codes;   // [rows, columns], contiguous
  at::Tensor scales;  // float32 [rows]: the values are codes · scales
};
// x: [rows, columns]. `type`: kFloat8_e4m3fn or kFloat8_e5m2. `factors`: float32 [columns], multiplied by first; may be
// undefined. A value that is not finite makes its row NaN.
Fp8Rows quantize_fp8_rows(const at::Tensor& x, at::ScalarType type, const at::Tensor& factors = {});

// Room for the e4m3 codes that a kernel makes of the rows it writes, [rows, columns] with a multiple of 16 columns, and
// how it is told of it; `factors` as above.
Fp8Rows empty_fp8_rows(int64_t rows, int64_t columns, at::Device device);
cuda::Fp8Codes describe(const Fp8Rows& rows, const at::Tensor& factors = {});

// [rows, columns] of one byte each → [columns, rows], contiguous.
at::Tensor transpose_bytes(const at::Tensor& x);

// a bᵀ + bias (may be undefined), [a rows, b rows] in `dtype`. On the CPU in float32 on the values themselves; on CUDA
// by tensor cores that add up with fewer bits, `dtype` bfloat16 and columns and b's rows multiples of
// Fp8Tensor::kExtent.
at::Tensor fp8_product(const Fp8Rows& a, const Fp8Rows& b, const at::Tensor& bias, at::ScalarType dtype);

class Fp8Tensor : public QuantizedTensor {
 public:
  static constexpr int64_t kExtent = 16;  // rows and columns: a multiple of it
  static bool fits(at::IntArrayRef shape);

  // ERR_MARTLET_CONFIG unless the shape fits.
  static QuantizedPtr quantize(const at::Tensor& weight);
  // `units`: that of the parts.
  Fp8Tensor(Fp8Rows rows, at::Tensor units, at::ScalarType dtype);

  void dequantize_to(const at::Tensor& out) const override;
  at::Device device() const override { return rows_.codes.device(); }
  at::Tensor linear(const at::Tensor& x, const at::Tensor& bias) const override;
  at::Tensor input_gradient(const at::Tensor& dy) const override;
  // The same of rows that are codes already: those of x, and kFp8Gradient of dy with rows().scales for factors.
  at::Tensor linear(const Fp8Rows& x, const at::Tensor& bias) const;
  at::Tensor input_gradient(const Fp8Rows& dy) const;
  std::vector<std::pair<std::string, at::Tensor>> stored() const override;
  bool describe(cuda::Matrix&) const override { return false; }

  const Fp8Rows& rows() const { return rows_; }
  const at::Tensor& units() const { return units_; }

 private:
  Fp8Rows rows_;      // of the weight [out, in]
  at::Tensor units_;  // float32 [in], ones: the scales of the transposed weight's rows
};

}  // namespace martlet
