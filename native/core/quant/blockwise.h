// 8-bit codes with one scale a block: the dynamic data type of bitsandbytes (Dettmers et al. 2022, "8-bit Optimizers
// via Block-wise Quantization"). ATen operations only, so that it runs where the tensors are.
#pragma once

#include <ATen/core/Tensor.h>

namespace martlet {

// The 256 values of the codes in rising order, float32 in [-1, 1] (or [0, 1]): bitsandbytes' create_dynamic_map.
at::Tensor dynamic_map(bool is_signed, at::Device device);

struct BlockwiseCodes {
  at::Tensor codes;   // uint8, the shape of what was quantised
  at::Tensor absmax;  // float32, one a block of consecutive elements; the last block may be short
};

// Each value divided by its block's largest magnitude, then the nearest value of `map`.
BlockwiseCodes quantize_blockwise(const at::Tensor& values, const at::Tensor& map, int64_t block_size);

// float32, the shape of `codes`.
at::Tensor dequantize_blockwise(const at::Tensor& codes, const at::Tensor& absmax, const at::Tensor& map,
                                int64_t block_size);

// Largest magnitude of each block of consecutive elements, float32; never 0.
at::Tensor block_absmax(const at::Tensor& flat, int64_t block_size);
// Each block of `flat` times its factor: float32, the size of `flat`.
at::Tensor scale_blocks(const at::Tensor& flat, const at::Tensor& factors, int64_t block_size);

}  // namespace martlet
