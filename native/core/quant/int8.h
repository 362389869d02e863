// int8 by rows: each row is divided by its largest magnitude and rounded to −127 … 127. Columns that hold outliers are
// kept as they are and leave the row's scale alone.
#pragma once

#include "core/quant/quantized_tensor.h"

namespace martlet {

class Int8Tensor : public QuantizedTensor {
 public:
  // A column is kept when it holds a magnitude above this many root mean squares of the matrix; at most one column in
  // 64, the largest first.
  static constexpr double kOutlierThreshold = 6.0;

  static QuantizedPtr quantize(const at::Tensor& weight);
  static QuantizedPtr read(const std::string& name, const std::function<at::Tensor(const std::string&)>& find,
                           at::IntArrayRef shape, at::ScalarType dtype, at::Device device);

  void dequantize_to(const at::Tensor& out) const override;
  at::Device device() const override { return codes_.device(); }
  std::vector<std::pair<std::string, at::Tensor>> stored() const override;
  bool describe(cuda::Matrix& out) const override;
  const at::Tensor& outlier_columns() const { return outlier_columns_; }

 private:
  Int8Tensor(at::IntArrayRef shape, at::ScalarType dtype) : QuantizedTensor(shape, dtype) {}

  // Into `out`, but for outlier columns: what ATen's operations make, bit for bit.
  void dequantize_on_cpu(const at::Tensor& out) const;

  at::Tensor codes_;  // int8 [out, in], 0 in outlier columns
  at::Tensor scale_;  // float32 [out]: largest magnitude of the row (bitsandbytes' SCB)
  at::Tensor outlier_columns_,
      outlier_values_;  // int64 [k], [out, k] in the compute dtype; undefined when there are none
};

}  // namespace martlet
