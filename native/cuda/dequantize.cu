// Weights of 4 and 8 bits to 16, bit for bit what quant/nf4.cpp and quant/int8.cpp make of them with ATen's operations.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 64;         // elements that share a scale
constexpr int kNestedBlock = 256;  // scales that share one of their own

__constant__ Nf4Codes codes_on_device = kNf4Codes;

__device__ float scale_of(const Nf4& op, int64_t block) {
  if (op.nested_map == nullptr) return static_cast<const float*>(op.scales)[block];
  const uint8_t code = static_cast<const uint8_t*>(op.scales)[block];
  return __fadd_rn(__fmul_rn(__ldg(op.nested_map + code), __ldg(op.nested_scales + block / kNestedBlock)),
                   op.nested_offset);
}

constexpr int kNf4Threads = 128, kSteps = 4;

// A thread does N numbers, which are of one block, kSteps times: all codes and scales are asked for before the first is
// used. blocks.x are rows, blocks.y parts of a row.
template <typename T, int N>
__global__ void nf4_rows(const Nf4 op, T* __restrict__ out) {
  // In shared memory, where threads of a warp may read different entries at once: 16 numbers are in banks of their own.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codes_on_device.values[threadIdx.x];
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * op.columns;
  const int begin = (static_cast<int>(blockIdx.y) * kSteps * kNf4Threads + static_cast<int>(threadIdx.x)) * N;
  out += blockIdx.x * op.out_pitch;
  uint32_t bytes[kSteps];
  float scale[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = begin + step * kNf4Threads * N;
    if (column >= op.columns) break;
    const int64_t i = first + column;
    bytes[step] = N == kVector ? __ldcs(reinterpret_cast<const uint32_t*>(op.codes + i / 2)) : op.codes[i / 2];
    scale[step] = scale_of(op, i / kBlock);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = begin + step * kNf4Threads * N;
    if (column >= op.columns) break;
    Vector<T, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // The first of two in the upper half.
      const bool upper = N == 1 ? (first + column) % 2 == 0 : j % 2 == 0;
      const uint32_t code = bytes[step] >> (8 * (j / 2) + (upper ? 4 : 0)) & 15;
      y.v[j] = from_float<T>(table[code] * scale[step]);
    }
    store<N>(out + column, y);
  }
}

template <typename T, int N>
__global__ void int8_rows(const int8_t* __restrict__ codes, const float* __restrict__ scales, T* __restrict__ out,
                          int columns, int64_t out_pitch) {
  const int64_t row = blockIdx.x;
  const float scale = scales[row];
  codes += row * columns;
  out += row * out_pitch;
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(codes + i);
    Vector<T, N> y;
    for (int j = 0; j < N; ++j)
      y.v[j] = from_float<T>(__fmul_rn(__fmul_rn(static_cast<float>(in.v[j]), scale), static_cast<float>(1.0 / 127.0)));
    store<N>(out + i, y);
  }
}

}  // namespace

Status nf4_dequantize(const Nf4& op, void* out, void* stream) {
  if (op.rows == 0 || op.columns == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && op.out_pitch % kVector == 0 && aligned(out) &&
                       reinterpret_cast<uintptr_t>(op.codes) % 4 == 0;
  with_type(op.type, [&]<typename T>(T) {
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      const dim3 blocks(blocks_for(op.rows, 1), blocks_for(op.columns, kSteps * kNf4Threads * N));
      nf4_rows<T, N><<<blocks, kNf4Threads, 0, static_cast<cudaStream_t>(stream)>>>(op, static_cast<T*>(out));
    });
  });
  return status();
}

Status int8_dequantize(const Int8& op, void* out, void* stream) {
  if (op.rows == 0 || op.columns == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && op.out_pitch % kVector == 0 && aligned(out) &&
                       reinterpret_cast<uintptr_t>(op.codes) % kVector == 0;
  with_type(op.type, [&]<typename T>(T) {
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      int8_rows<T, N><<<blocks_for(op.rows, 1), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          op.codes, op.scales, static_cast<T*>(out), op.columns, op.out_pitch);
    });
  });
  return status();
}

}  // namespace martlet::cuda
