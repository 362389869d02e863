// 4-bit NormalFloat: blocks of 64 values, each a 4-bit code times the block's largest magnitude; with double
// quantisation that scale is 8-bit too, in blocks of 256 around the mean.
#pragma once

#include "core/quant/quantized_tensor.h"

namespace martlet {

class Nf4Tensor : public QuantizedTensor {
 public:
  static constexpr int64_t kBlock = 64, kScaleBlock = 256;
  static constexpr const char* kStateSuffix = ".quant_state.bitsandbytes__nf4";

  static QuantizedPtr quantize(const at::Tensor& weight, bool double_quantization);
  static QuantizedPtr read(const std::string& name, const std::function<at::Tensor(const std::string&)>& find,
                           at::IntArrayRef shape, at::ScalarType dtype, at::Device device);

  void dequantize_to(const at::Tensor& out) const override;
  at::Device device() const override { return codes_.device(); }
  std::vector<std::pair<std::string, at::Tensor>> stored() const override;
  bool describe(cuda::Matrix& out) const override;

 private:
  Nf4Tensor(at::IntArrayRef shape, at::ScalarType dtype) : QuantizedTensor(shape, dtype) {}
  at::Tensor scales() const;  // float32, one a block
  // Into `out`, flat: what ATen's operations make, bit for bit.
  void dequantize_on_cpu(at::Tensor& out) const;

  at::Tensor codes_;   // uint8 [⌈n/2⌉, 1]: two codes a byte, the first in the high half
  at::Tensor absmax_;  // float32 [blocks], or uint8 with double quantisation
  // Double quantisation only: scale = nested_map_[absmax_] · nested_absmax_ + offset_.
  at::Tensor nested_absmax_, nested_map_;
  double offset_ = 0;
};

}  // namespace martlet
