// Rows to 8-bit floats, bit for bit what quant/fp8.cpp makes of them with ATen's operations, and 8-bit matrices
// transposed.
#include <cuda_fp8.h>

#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr float kLeast = 1e-30f;  // as in quant/fp8.cpp

__device__ float block_max(float x) {
  __shared__ float warps[32];
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned int i = 0; i < blockDim.x / 32; ++i) x = fmaxf(x, warps[i]);
  return x;
}

constexpr int kMost = 1024;  // threads

// A block does a row, which its threads keep in registers: kVectors times 8 numbers each.
template <typename T, int kVectors, bool kE5m2>
__global__ void __launch_bounds__(kMost)
    quantize_rows(const T* __restrict__ x, int64_t pitch, const float* __restrict__ factors,
                  uint8_t* __restrict__ codes, float* __restrict__ scales, int columns) {
  constexpr float kLargest = kE5m2 ? 57344.0f : 448.0f;
  constexpr __nv_fp8_interpretation_t kType = kE5m2 ? __NV_E5M2 : __NV_E4M3;
  x += blockIdx.x * pitch;
  codes += int64_t{blockIdx.x} * columns;
  const auto column = [&](int v) { return static_cast<int>((v * blockDim.x + threadIdx.x) * kVector); };
  // The number at column i + j times its factor.
  const auto scaled = [&](const Vector<T, kVector>& in, int i, float (&out)[kVector]) {
    for (int j = 0; j < kVector; ++j) out[j] = to_float(in.v[j]);
    if (factors == nullptr) return;
    const auto low = load<4>(factors + i), high = load<4>(factors + i + 4);
    for (int j = 0; j < 4; ++j) {
      out[j] *= low.v[j];
      out[j + 4] *= high.v[j];
    }
  };
  Vector<T, kVector> row[kVectors];
  float values[kVector], largest = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = column(v);
    if (i >= columns) continue;
    row[v] = load<kVector>(x + i);
    scaled(row[v], i, values);
    // max() of ATen gives NaN for NaN, fmaxf does not; the NaN's own code tells of it in both.
    for (int j = 0; j < kVector; ++j) largest = fmaxf(largest, fabsf(values[j]));
  }
  largest = fmaxf(block_max(largest), kLeast);
  const float inverse = __fdiv_rn(kLargest, largest);
  if (threadIdx.x == 0) scales[blockIdx.x] = __fdiv_rn(largest, kLargest);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = column(v);
    if (i >= columns) continue;
    scaled(row[v], i, values);
    Vector<uint16_t, kVector / 2> out;
    for (int j = 0; j < kVector / 2; ++j) {
      out.v[j] = __nv_cvt_float2_to_fp8x2(make_float2(values[2 * j] * inverse, values[2 * j + 1] * inverse),
                                          __NV_SATFINITE, kType);
    }
    store<kVector / 2>(reinterpret_cast<uint16_t*>(codes + i), out);
  }
}

constexpr int kTile = 128;  // bytes, each way
constexpr int kWarps = 8;

// Each thread turns 4 × 4 bytes in registers; shared memory holds words of 4 bytes of one column.
__global__ void transpose(const uint8_t* __restrict__ x, uint8_t* __restrict__ out, int64_t rows, int64_t columns) {
  // Line 32 · j + lane is column 4 · lane + j: neighbours write to different banks.
  __shared__ uint32_t tile[kTile][kTile / 4 + 1];
  const int64_t row0 = int64_t{blockIdx.y} * kTile, column0 = int64_t{blockIdx.x} * kTile;
  const int lane = threadIdx.x, warp = threadIdx.y;
  for (int group = warp; group < kTile / 4; group += kWarps) {
    const int64_t row = row0 + group * 4, column = column0 + lane * 4;
    if (row >= rows || column >= columns) continue;
    uint32_t in[4];
    for (int i = 0; i < 4; ++i) in[i] = *reinterpret_cast<const uint32_t*>(x + (row + i) * columns + column);
    const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140), low23 = __byte_perm(in[2], in[3], 0x5140),
                   high01 = __byte_perm(in[0], in[1], 0x7362), high23 = __byte_perm(in[2], in[3], 0x7362);
    tile[lane][group] = __byte_perm(low01, low23, 0x5410);
    tile[32 + lane][group] = __byte_perm(low01, low23, 0x7632);
    tile[64 + lane][group] = __byte_perm(high01, high23, 0x5410);
    tile[96 + lane][group] = __byte_perm(high01, high23, 0x7632);
  }
  __syncthreads();
  const int64_t row = row0 + lane * 4;
  for (int line = warp; line < kTile; line += kWarps) {
    const int64_t column = column0 + line % 32 * 4 + line / 32;
    if (row < rows && column < columns) *reinterpret_cast<uint32_t*>(out + column * rows + row) = tile[line][lane];
  }
}

}  // namespace

Status fp8_quantize_rows(const Fp8Rows& op, void* stream) {
  if (op.rows == 0 || op.columns == 0) return nullptr;
  if (op.columns % 16 != 0 || op.pitch % kVector != 0 || !aligned(op.x) || !aligned(op.codes) || !aligned(op.factors))
    return "rows to quantise are not aligned";
  if (op.columns > kMost * kVector * 8) return "more than 65536 columns in rows to quantise";
  with_type(op.type, [&]<typename T>(T) {
    const auto launch = [&]<int kVectors, bool kE5m2>(std::integral_constant<int, kVectors>,
                                                      std::bool_constant<kE5m2>) {
      const unsigned int threads = blocks_for(op.columns, kVectors * kVector * 32) * 32;
      quantize_rows<T, kVectors, kE5m2>
          <<<static_cast<unsigned int>(op.rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(op.x), op.pitch, op.factors, static_cast<uint8_t*>(op.codes), op.scales,
              op.columns);
    };
    const auto with_format = [&](auto vectors) {
      if (op.e5m2) {
        launch(vectors, std::true_type{});
      } else {
        launch(vectors, std::false_type{});
      }
    };
    if (op.columns <= kMost * kVector * 4) {
      with_format(std::integral_constant<int, 4>{});
    } else {
      with_format(std::integral_constant<int, 8>{});
    }
  });
  return status();
}

Status transpose_bytes(const void* x, void* out, int64_t rows, int64_t columns, void* stream) {
  if (rows == 0 || columns == 0) return nullptr;
  if (rows % 4 != 0 || columns % 4 != 0 || !aligned(x) || !aligned(out)) return "bytes to transpose are not aligned";
  if (blocks_for(rows, kTile) > 65535) return "too many rows of bytes to transpose";
  transpose<<<dim3(blocks_for(columns, kTile), blocks_for(rows, kTile)), dim3(32, kWarps), 0,
              static_cast<cudaStream_t>(stream)>>>(static_cast<const uint8_t*>(x), static_cast<uint8_t*>(out), rows,
                                                   columns);
  return status();
}

}  // namespace martlet::cuda
