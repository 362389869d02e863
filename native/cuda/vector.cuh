// What the kernels share: 16-bit numbers read and written 8 at a time (16 bytes), launches, sums over a row's threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/kernels.h"

namespace martlet::cuda {

constexpr int kVector = 8;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
// As stored in T and read again.
template <typename T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};
// `p` is aligned to N elements.
template <int N, typename T>
__device__ Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <int N, typename T>
__device__ void store(T* p, const Vector<T, N>& x) {
  *reinterpret_cast<Vector<T, N>*>(p) = x;
}

// Sum over the kThreads threads (32, or a whole block of more) that share a row; each gets it.
template <int kThreads>
__device__ float row_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if constexpr (kThreads > 32) {
    __shared__ float warps[kThreads / 32];
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < kThreads / 32; ++i) x += warps[i];
  }
  return x;
}

__host__ __device__ inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % (kVector * 2) == 0; }

inline Status status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// fn(T{}) with the type's C++ type.
template <typename Fn>
void with_type(Type type, const Fn& fn) {
  if (type == Type::kHalf) {
    fn(__half{});
  } else {
    fn(__nv_bfloat16{});
  }
}

// fn(integral constant of how many numbers are read at a time).
template <typename Fn>
void with_width(bool vectors, const Fn& fn) {
  if (vectors) {
    fn(std::integral_constant<int, kVector>{});
  } else {
    fn(std::integral_constant<int, 1>{});
  }
}

inline unsigned int blocks_for(int64_t items, int per_block) {
  return static_cast<unsigned int>((items + per_block - 1) / per_block);
}

Status rms_norm(const RmsNorm& op, double eps, void* y, float* rstd, void* stream);
Status rms_norm_backward(const RmsNorm& op, const void* dy, const float* rstd, void* dx, void* stream);
Status add_rms_norm(const RmsNorm& op, void* sum, double eps, void* y, float* rstd, void* stream);
Status rms_norm_backward_add(const RmsNorm& op, void* dy, const float* rstd, const void* residual, void* dx,
                             void* stream);
Status rotary(const Rotary& op, void* stream);
Status swiglu(const void* gate, const void* up, void* out, int64_t n, Type type, void* stream);
Status swiglu_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n, Type type,
                       void* stream);
Status swiglu_halves(const void* gate_up, int64_t pitch, void* out, int64_t out_pitch, int64_t rows, int32_t columns,
                     Type type, const Fp8Codes& codes, void* stream);
Status swiglu_halves_backward(void* gate_up, int64_t pitch, void* dy, int64_t out_pitch, int64_t rows, int32_t columns,
                              Type type, const Fp8Codes& codes, void* stream);
Status cross_entropy(const CrossEntropy& op, float scale, float smoothing, bool gradient, float* losses, bool* correct,
                     void* stream);
Status quick_gelu(const void* x, void* out, int64_t n, Type type, void* stream);
Status nf4_dequantize(const Nf4& op, void* out, void* stream);
Status int8_dequantize(const Int8& op, void* out, void* stream);
Status pair_gradients_scratch(const PairGradients& op, int64_t* numbers);
Status pair_gradients(const PairGradients& op, void* stream);
Status copy_pairs(const PairCopy* pairs, int32_t count, Type type, void* stream);
Status add_sums(const Sum* sums, int32_t count, Type type, void* stream);
Status copy_rows(const void* x, int64_t pitch, void* out, int64_t out_pitch, int64_t bytes, int64_t rows, void* stream);
Status compute_capability(int32_t* capability);
Status fp8_quantize_rows(const Fp8Rows& op, void* stream);
Status transpose_bytes(const void* x, void* out, int64_t rows, int64_t columns, void* stream);
extern const DecodeKernels decode_kernels;

}  // namespace martlet::cuda
