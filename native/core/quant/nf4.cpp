#include "core/quant/nf4.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "core/base/cpu_kernels.h"
#include "core/base/cuda_kernels.h"
#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/quant/blockwise.h"

namespace martlet {
namespace {

using nlohmann::json;

// Elements at a time, a multiple of the block: float32 temporaries of 4 MB on the CPU, of 64 MB where each call costs
// a launch.
int64_t chunk_size(at::Device device) { return int64_t{device.is_cpu() ? 1 : 16} << 20; }

at::Tensor code_table(at::Device device) {
  return at::from_blob(const_cast<float*>(cuda::kNf4Codes.values), {16}, at::kFloat).clone().to(device);
}

// Both values of a byte: [256, 2].
at::Tensor pair_table(at::Device device) {
  const at::Tensor table = code_table(device),
                   byte = at::arange(256, at::TensorOptions().dtype(at::kInt).device(device));
  return at::stack({table.index_select(0, at::div(byte, 16, "floor")), table.index_select(0, byte.remainder(16))}, 1);
}

}  // namespace

QuantizedPtr Nf4Tensor::quantize(const at::Tensor& weight, bool double_quantization) {
  std::shared_ptr<Nf4Tensor> out(new Nf4Tensor(weight.sizes(), weight.scalar_type()));
  const at::Tensor flat = weight.reshape(-1), table = code_table(weight.device());
  const at::Tensor middles = (table.narrow(0, 0, 15) + table.narrow(0, 1, 15)) / 2.0;
  const int64_t n = flat.numel(), chunk = chunk_size(weight.device());
  out->codes_ = at::empty({(n + 1) / 2, 1}, weight.options().dtype(at::kByte));
  out->absmax_ = at::empty({(n + kBlock - 1) / kBlock}, weight.options().dtype(at::kFloat));
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t length = std::min(chunk, n - begin);
    const at::Tensor part = flat.narrow(0, begin, length), absmax = block_absmax(part, kBlock);
    at::Tensor scaled = scale_blocks(part, absmax.reciprocal(), kBlock).clamp_(-1, 1);
    if (length % 2 != 0) scaled = at::constant_pad_nd(scaled, {0, 1});
    const at::Tensor codes =
        at::bucketize(scaled.contiguous(), middles, /*out_int32=*/true).to(at::kByte).view({-1, 2});
    out->codes_.narrow(0, begin / 2, codes.size(0))
        .copy_(codes.select(1, 0).mul(16).add_(codes.select(1, 1)).unsqueeze(1));
    out->absmax_.narrow(0, begin / kBlock, absmax.numel()).copy_(absmax);
  }
  if (double_quantization) {
    const at::Tensor mean = out->absmax_.mean();
    out->offset_ = mean.item<float>();
    out->nested_map_ = dynamic_map(/*is_signed=*/true, weight.device());
    const BlockwiseCodes coded = quantize_blockwise(out->absmax_ - mean, out->nested_map_, kScaleBlock);
    out->absmax_ = coded.codes;
    out->nested_absmax_ = coded.absmax;
  }
  return out;
}

at::Tensor Nf4Tensor::scales() const {
  if (!nested_absmax_.defined()) return absmax_;
  return dequantize_blockwise(absmax_, nested_absmax_, nested_map_, kScaleBlock).add_(offset_);
}

void Nf4Tensor::dequantize_to(const at::Tensor& out) const {
  if (const cuda::Kernels* kernels = cuda_kernels(out)) {
    const bool nested = nested_absmax_.defined();
    const cuda::Nf4 op = {codes_.const_data_ptr<uint8_t>(),
                          absmax_.const_data_ptr(),
                          nested ? nested_map_.const_data_ptr<float>() : nullptr,
                          nested ? nested_absmax_.const_data_ptr<float>() : nullptr,
                          static_cast<float>(offset_),
                          shape_[0],
                          static_cast<int32_t>(shape_[1]),
                          out.stride(0),
                          cuda_type(dtype_)};
    return check_cuda(kernels->nf4_dequantize(op, out.mutable_data_ptr(), cuda_stream(out)));
  }
  const int64_t n = shape_[0] * shape_[1];
  at::Tensor flat = out.is_contiguous() ? out.view(-1) : at::empty({n}, out.options());
  if (out.is_cpu() && best_isa() != Isa::kPlain) {
    dequantize_on_cpu(flat);
    if (!out.is_contiguous()) out.copy_(flat.view(shape_));
    return;
  }
  const at::Tensor table = pair_table(codes_.device()), scale = scales(), bytes = codes_.view(-1);
  const int64_t chunk = chunk_size(codes_.device());
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t length = std::min(chunk, n - begin);
    const at::Tensor part = bytes.narrow(0, begin / 2, (length + 1) / 2).to(at::kInt);
    const at::Tensor values = table.index_select(0, part).view(-1).narrow(0, 0, length);
    const at::Tensor factors = scale.narrow(0, begin / kBlock, (length + kBlock - 1) / kBlock);
    flat.narrow(0, begin, length).copy_(scale_blocks(values, factors, kBlock));
  }
  if (!out.is_contiguous()) out.copy_(flat.view(shape_));
}

void Nf4Tensor::dequantize_on_cpu(at::Tensor& out) const {
  cuda::Matrix matrix = {};
  describe(matrix);
  const CpuKernels& kernels = cpu_kernels();
  const int64_t n = out.numel();
  void* data = out.mutable_data_ptr();
  parallel_ranges((n + kPiece - 1) / kPiece, 64, [&](int64_t first, int64_t last) {
    std::array<float, kPiece> piece;
    for (int64_t begin = first * kPiece; begin < std::min(n, last * kPiece); begin += kPiece) {
      const int64_t count = std::min(kPiece, n - begin);
      decode_nf4(kernels, matrix, begin, count, piece.data());
      store_rounded(kernels, piece.data(), count, data, begin, dtype_);
    }
  });
}

bool Nf4Tensor::describe(cuda::Matrix& out) const {
  out.storage = cuda::Storage::kNf4;
  out.weight = codes_.const_data_ptr();
  out.scales = absmax_.const_data_ptr();
  if (!nested_absmax_.defined()) return true;
  out.nested_map = nested_map_.const_data_ptr<float>();
  out.nested_scales = nested_absmax_.const_data_ptr<float>();
  out.nested_offset = static_cast<float>(offset_);
  return true;
}

std::vector<std::pair<std::string, at::Tensor>> Nf4Tensor::stored() const {
  json state = {{"quant_type", "nf4"}, {"blocksize", kBlock}, {"dtype", dtype_name(dtype_)}, {"shape", shape_}};
  std::vector<std::pair<std::string, at::Tensor>> out = {
      {"", codes_}, {".absmax", absmax_}, {".quant_map", code_table(codes_.device())}};
  if (nested_absmax_.defined()) {
    state.update({{"nested_blocksize", kScaleBlock}, {"nested_dtype", "float32"}, {"nested_offset", offset_}});
    out.emplace_back(".nested_absmax", nested_absmax_);
    out.emplace_back(".nested_quant_map", nested_map_);
  }
  const std::string text = state.dump();
  out.emplace_back(
      kStateSuffix,
      at::tensor(at::ArrayRef<uint8_t>(reinterpret_cast<const uint8_t*>(text.data()), text.size()), at::kByte));
  return out;
}

QuantizedPtr Nf4Tensor::read(const std::string& name, const std::function<at::Tensor(const std::string&)>& find,
                             at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  const auto wrong = [&](const std::string& what) {
    fail(code::kWeights, "The quantised tensor " + name + " " + what + ". Download the checkpoint again.",
         {{"key", name}});
  };
  const at::Tensor text = find(kStateSuffix).contiguous();
  const auto* begin = static_cast<const char*>(text.const_data_ptr());
  const json state = json::parse(begin, begin + text.nbytes(), nullptr, /*allow_exceptions=*/false);
  if (!state.is_object() || state.value("blocksize", json()) != kBlock)
    wrong("has no quantisation state that can be read (blocks of 64 are known)");
  if (state.value("shape", json()) != json(shape.vec())) {
    wrong("has the shape " + state.value("shape", json()).dump() + ", but config.json asks for " +
          json(shape.vec()).dump());
  }
  std::shared_ptr<Nf4Tensor> out(new Nf4Tensor(shape, dtype));
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const auto take = [&](const std::string& suffix, at::ScalarType type, int64_t size) {
    const at::Tensor tensor = find(suffix);
    if (!tensor.defined() || tensor.scalar_type() != type || tensor.numel() != size)
      wrong("lacks " + name + suffix + ", or it has another size or dtype");
    return tensor.to(device, /*dtype=*/type, /*non_blocking=*/false, /*copy=*/true);
  };
  out->codes_ = take("", at::kByte, (n + 1) / 2).view({-1, 1});
  const bool nested = state.contains("nested_offset") && !state["nested_offset"].is_null();
  out->absmax_ = take(".absmax", nested ? at::kByte : at::kFloat, blocks).view(-1);
  if (nested) {
    if (state.value("nested_blocksize", json()) != kScaleBlock || !state["nested_offset"].is_number())
      wrong("has nested scales in blocks other than 256");
    out->nested_absmax_ = take(".nested_absmax", at::kFloat, (blocks + kScaleBlock - 1) / kScaleBlock).view(-1);
    out->nested_map_ = take(".nested_quant_map", at::kFloat, 256).view(-1);
    out->offset_ = state["nested_offset"].get<double>();
  }
  return out;
}

}  // namespace martlet
