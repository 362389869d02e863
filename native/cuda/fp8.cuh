// Rows to 8-bit floats, in kernels of their own and at the end of those that make the rows: bit for bit what
// quant/fp8.cpp makes of them with ATen's operations.
#pragma once

#include <cuda_fp8.h>

#include "cuda/vector.cuh"

namespace martlet::cuda {

constexpr float kFp8Least = 1e-30f;  // as in quant/fp8.cpp
template <bool kE5m2>
constexpr float kFp8Largest = kE5m2 ? 57344.0f : 448.0f;

// The numbers of the columns from i on times their factors; factors may be null.
template <typename T>
__device__ void fp8_values(const Vector<T, kVector>& in, const float* factors, int i, float (&out)[kVector]) {
  for (int j = 0; j < kVector; ++j) out[j] = to_float(in.v[j]);
  if (factors == nullptr) return;
  const auto low = load<4>(factors + i), high = load<4>(factors + i + 4);
  for (int j = 0; j < 4; ++j) {
    out[j] *= low.v[j];
    out[j + 4] *= high.v[j];
  }
}

// The largest magnitude of `largest` and of those.
template <typename T>
__device__ float fp8_largest(float largest, const Vector<T, kVector>& in, const float* factors, int i) {
  float values[kVector];
  fp8_values(in, factors, i, values);
  // max() of ATen gives NaN for NaN, fmaxf does not; the NaN's own code tells of it in both.
  for (int j = 0; j < kVector; ++j) largest = fmaxf(largest, fabsf(values[j]));
  return largest;
}

// A row's scale and codes, from its largest magnitude.
template <bool kE5m2>
struct Fp8Rounding {
  __device__ explicit Fp8Rounding(float row_largest) : largest(fmaxf(row_largest, kFp8Least)) {
    inverse = __fdiv_rn(kFp8Largest<kE5m2>, largest);
  }
  __device__ float scale() const { return __fdiv_rn(largest, kFp8Largest<kE5m2>); }
  template <typename T>
  __device__ void store_codes(uint8_t* codes, const Vector<T, kVector>& in, const float* factors, int i) const {
    float values[kVector];
    fp8_values(in, factors, i, values);
    Vector<uint16_t, kVector / 2> out;
    for (int j = 0; j < kVector / 2; ++j) {
      out.v[j] = __nv_cvt_float2_to_fp8x2(make_float2(values[2 * j] * inverse, values[2 * j + 1] * inverse),
                                          __NV_SATFINITE, kE5m2 ? __NV_E5M2 : __NV_E4M3);
    }
    store<kVector / 2>(reinterpret_cast<uint16_t*>(codes + i), out);
  }
  float largest, inverse;
};

// The largest over the kThreads threads (32, or a whole block of more) that share a row; each gets it. What the
// threads of a whole block wrote to shared memory before, all of them may read afterwards. Once in a kernel.
template <int kThreads>
__device__ float row_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if constexpr (kThreads > 32) {
    __shared__ float warps[kThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, warps[i]);
  }
  return x;
}

// Codes and scale of row `index`, which lies in shared memory; `largest`: of what this thread has of it.
template <int kThreads, bool kE5m2, typename T>
__device__ void write_codes(const Fp8Codes& out, const T* shared_row, int64_t index, int columns, float largest) {
  const Fp8Rounding<kE5m2> rounding(row_max<kThreads>(largest));
  if (threadIdx.x == 0) out.scales[index] = rounding.scale();
  uint8_t* codes = static_cast<uint8_t*>(out.codes) + index * columns;
  for (int i = threadIdx.x * kVector; i < columns; i += kThreads * kVector)
    rounding.store_codes(codes, load<kVector>(shared_row + i), out.factors, i);
}

// fn(integral constant of a block's threads) for a block that keeps a row of so many bytes in shared memory: so many
// that rows of several blocks are under way on a multiprocessor. False where a block has no room for the row.
template <typename Fn>
bool with_shared_row(int64_t bytes, const Fn& fn) {
  int device = 0, room = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (bytes + 1024 > room) return false;
  if (bytes <= 45 * 1024) {  // five of them on a Hopper
    fn(std::integral_constant<int, 256>{});
  } else {
    fn(std::integral_constant<int, 512>{});
  }
  return true;
}

inline bool takes(const Fp8Codes& out) { return aligned(out.codes) && aligned(out.factors); }

// For fp8_quantize_rows(), where the rows have been made without codes.
inline Fp8Rows rows_of(const void* x, int64_t pitch, int64_t rows, int32_t columns, Type type, const Fp8Codes& out) {
  return {x, pitch, out.factors, out.codes, out.scales, rows, columns, type, /*e5m2=*/false};
}

// Lets the kernel's blocks have so many bytes of shared memory.
template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace martlet::cuda
