// Rows to 8-bit floats, and 8-bit matrices transposed.
#include "cuda/fp8.cuh"

namespace martlet::cuda {
namespace {

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
  x += blockIdx.x * pitch;
  codes += int64_t{blockIdx.x} * columns;
  const auto column = [&](int v) { return static_cast<int>((v * blockDim.x + threadIdx.x) * kVector); };
  Vector<T, kVector> row[kVectors];
  float largest = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = column(v);
    if (i >= columns) continue;
    row[v] = load<kVector>(x + i);
    largest = fp8_largest(largest, row[v], factors, i);
  }
  const Fp8Rounding<kE5m2> rounding(block_max(largest));
  if (threadIdx.x == 0) scales[blockIdx.x] = rounding.scale();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = column(v);
    if (i < columns) rounding.store_codes(codes, row[v], factors, i);
  }
}

// The same for wide rows, in shared memory: in registers one row alone would fill a multiprocessor, and its reading
// and writing would wait for each other.
template <typename T, int kThreads, bool kE5m2>
__global__ void __launch_bounds__(kThreads, 1280 / kThreads)
    quantize_wide_rows(const T* __restrict__ x, int64_t pitch, const Fp8Codes out, int columns) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* row = reinterpret_cast<T*>(shared);
  x += blockIdx.x * pitch;
  float largest = 0;
#pragma unroll 2
  for (int i = threadIdx.x * kVector; i < columns; i += kThreads * kVector) {
    const auto in = load<kVector>(x + i);
    store<kVector>(row + i, in);
    largest = fp8_largest(largest, in, out.factors, i);
  }
  write_codes<kThreads, kE5m2>(out, row, blockIdx.x, columns, largest);
}

// Whether they were launched.
template <typename T, bool kE5m2>
bool launch_wide_rows(const Fp8Rows& op, cudaStream_t stream) {
  const int64_t bytes = op.columns * static_cast<int64_t>(sizeof(T));
  return with_shared_row(bytes, [&]<int kThreads>(std::integral_constant<int, kThreads>) {
    const auto kernel = quantize_wide_rows<T, kThreads, kE5m2>;
    allow_shared(kernel, bytes);
    kernel<<<static_cast<unsigned int>(op.rows), kThreads, bytes, stream>>>(
        static_cast<const T*>(op.x), op.pitch, Fp8Codes{op.factors, op.codes, op.scales}, op.columns);
  });
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
    const auto with_format = [&](auto e5m2) {
      if (op.columns <= kMost * kVector * 2) {
        launch(std::integral_constant<int, 4>{}, e5m2);
      } else if (!launch_wide_rows<T, e5m2.value>(op, static_cast<cudaStream_t>(stream))) {
        launch(std::integral_constant<int, 8>{}, e5m2);
      }
    };
    if (op.e5m2) {
      with_format(std::true_type{});
    } else {
      with_format(std::false_type{});
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
