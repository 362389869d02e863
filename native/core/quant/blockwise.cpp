#include "core/quant/blockwise.h"

#include <ATen/ATen.h>

#include <cmath>

namespace martlet {

at::Tensor dynamic_map(bool is_signed, at::Device device) {
  constexpr int kExponents = 7;
  std::vector<at::Tensor> parts;
  const auto add = [&](int exponent, int64_t items) {
    const at::Tensor bounds = at::linspace(0.1, 1, items + 1, at::kFloat);
    const at::Tensor means = (bounds.narrow(0, 0, items) + bounds.narrow(0, 1, items)) / 2.0;
    const double scale = std::pow(10.0, exponent - (kExponents - 1));
    parts.push_back(means * scale);
    if (is_signed) parts.push_back(means * -scale);
  };
  for (int i = 0; i < kExponents; ++i) add(i, int64_t{1} << (is_signed ? i : i + 1));
  parts.push_back(at::tensor({0.0f, 1.0f}));
  const at::Tensor map = std::get<0>(at::cat(parts).sort());
  return map.to(device);
}

namespace {

// Short last blocks are padded with zeros, which change no maximum.
at::Tensor in_blocks(const at::Tensor& flat, int64_t block_size) {
  const int64_t rest = flat.numel() % block_size;
  return (rest == 0 ? flat : at::constant_pad_nd(flat, {0, block_size - rest})).view({-1, block_size});
}

}  // namespace

at::Tensor block_absmax(const at::Tensor& flat, int64_t block_size) {
  return in_blocks(flat, block_size).abs().amax(1).to(at::kFloat).clamp_min_(1e-38);
}

at::Tensor scale_blocks(const at::Tensor& flat, const at::Tensor& factors, int64_t block_size) {
  return (in_blocks(flat.to(at::kFloat), block_size) * factors.unsqueeze(1)).view(-1).narrow(0, 0, flat.numel());
}

BlockwiseCodes quantize_blockwise(const at::Tensor& values, const at::Tensor& map, int64_t block_size) {
  const at::Tensor flat = values.reshape(-1).to(at::kFloat);
  const at::Tensor absmax = block_absmax(flat, block_size);
  const at::Tensor scaled =
      (in_blocks(flat, block_size) / absmax.unsqueeze(1)).view(-1).narrow(0, 0, flat.numel()).contiguous();
  const at::Tensor middles = (map.narrow(0, 0, 255) + map.narrow(0, 1, 255)) / 2.0;
  return {at::bucketize(scaled, middles, /*out_int32=*/true).to(at::kByte).view(values.sizes()), absmax};
}

at::Tensor dequantize_blockwise(const at::Tensor& codes, const at::Tensor& absmax, const at::Tensor& map,
                                int64_t block_size) {
  const at::Tensor values = map.index_select(0, codes.reshape(-1).to(at::kInt));
  return scale_blocks(values, absmax, block_size).view(codes.sizes());
}

}  // namespace martlet
