// Weights of 4 and 8 bits to 16, bit for bit what quant/nf4.cpp and quant/int8.cpp make of them with ATen's operations.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 64;         // elements that share a scale
constexpr int kNestedBlock = 256;  // scales that share one of their own

// Table of the QLoRA paper's appendix E, as bitsandbytes has it.
__constant__ float kCodes[16] = {-1.0f,
                                 -0.6961928009986877f,
                                 -0.5250730514526367f,
                                 -0.39491748809814453f,
                                 -0.28444138169288635f,
                                 -0.18477343022823334f,
                                 -0.09105003625154495f,
                                 0.0f,
                                 0.07958029955625534f,
                                 0.16093020141124725f,
                                 0.24611230194568634f,
                                 0.33791524171829224f,
                                 0.44070982933044434f,
                                 0.5626170039176941f,
                                 0.7229568362236023f,
                                 1.0f};

// One thread does 8 elements, which are of one block.
template <typename T>
__global__ void nf4(const uint8_t* __restrict__ codes, const void* __restrict__ scales,
                    const float* __restrict__ nested_map, const float* __restrict__ nested_scales, float offset,
                    T* __restrict__ out, int64_t n) {
  // In shared memory, where threads of a warp may read different entries at once.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = kCodes[threadIdx.x];
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
    const auto launch = [&]<int N>(std::integral_constant<int, N>) {
      int8_rows<T, N><<<blocks_for(op.rows, 1), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          op.codes, op.scales, static_cast<T*>(out), op.columns);
    };
    if (vectors) {
      launch(std::integral_constant<int, kVector>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
  });
  return status();
}

}  // namespace martlet::cuda
