// Weights of 4 and 8 bits to 16, bit for bit what quant/nf4.cpp and quant/int8.cpp make of them with ATen's operations.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 64;         // elements that share a scale
constexpr int kNestedBlock = 256;  // scales that share one of their own

__constant__ Nf4Codes codes_on_device = kNf4Codes;

// One thread does 8 elements, which are of one block.
template <typename T>
__global__ void nf4(const uint8_t* __restrict__ codes, const void* __restrict__ scales,
                    const float* __restrict__ nested_map, const float* __restrict__ nested_scales, float offset,
                    T* __restrict__ out, int64_t n) {
  // In shared memory, where threads of a warp may read different entries at once.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codes_on_device.values[threadIdx.x];
  __syncthreads();
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector;
  if (i >= n) return;
  const int64_t block = i / kBlock;
  float scale;
  if (nested_map == nullptr) {
    scale = static_cast<const float*>(scales)[block];
  } else {
    const uint8_t code = static_cast<const uint8_t*>(scales)[block];
    scale = __fadd_rn(__fmul_rn(nested_map[code], nested_scales[block / kNestedBlock]), offset);
  }
  const auto value = [&](uint32_t code) { return from_float<T>(table[code] * scale); };
  if (i + kVector <= n) {
    const auto bytes = load<kVector / 2>(codes + i / 2);
    Vector<T, kVector> y;
    for (int j = 0; j < kVector / 2; ++j) {
      y.v[2 * j] = value(bytes.v[j] >> 4);
      y.v[2 * j + 1] = value(bytes.v[j] & 15);
    }
    store<kVector>(out + i, y);
    return;
  }
  for (int64_t j = i; j < n; ++j) {
    const uint8_t byte = codes[j / 2];
    out[j] = value(j % 2 == 0 ? byte >> 4 : byte & 15);
  }
}

template <typename T, int N>
__global__ void int8_rows(const int8_t* __restrict__ codes, const float* __restrict__ scales, T* __restrict__ out,
                          int columns) {
  const int64_t row = blockIdx.x;
  const float scale = scales[row];
  codes += row * columns;
  out += row * columns;
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
  if (op.elements == 0) return nullptr;
  if (!aligned(out) || reinterpret_cast<uintptr_t>(op.codes) % 4 != 0) return "an NF4 tensor is not aligned";
  with_type(op.type, [&]<typename T>(T) {
    nf4<T><<<blocks_for(op.elements, kThreads * kVector), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        op.codes, op.scales, op.nested_map, op.nested_scales, op.nested_offset, static_cast<T*>(out), op.elements);
  });
  return status();
}

Status int8_dequantize(const Int8& op, void* out, void* stream) {
  if (op.rows == 0 || op.columns == 0) return nullptr;
  const bool vectors =
      op.columns % kVector == 0 && aligned(out) && reinterpret_cast<uintptr_t>(op.codes) % kVector == 0;
  with_type(op.type, [&]<typename T>(T) {
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      int8_rows<T, N><<<blocks_for(op.rows, 1), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          op.codes, op.scales, static_cast<T*>(out), op.columns);
    });
  });
  return status();
}

}  // namespace martlet::cuda
