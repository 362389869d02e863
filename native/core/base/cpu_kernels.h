// Loops over weights on the CPU, written for what the processor has and chosen as the program runs: codes to float32,
// float32 to 16 bits, and sums of products.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <functional>

#include "cuda/decode.h"

namespace martlet {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16 };
bool is_supported(Isa isa);  // by this processor
Isa best_isa();

// Of NF4: elements that share a scale, scales that share one.
inline constexpr int64_t kNf4Block = 64, kNf4ScaleBlock = 256;
inline constexpr int64_t kCacheLine = 64;
// Weights that are decoded at a time, a multiple of the block: 4 KB of float32, which the first-level cache keeps.
inline constexpr int64_t kPiece = 1024;

// Asks for the line of memory some way behind `here`, across the borders of pages, where the processor's own
// prefetching stops. A loop does it as it goes: many at once wait for each other. Past the end nothing is fetched.
inline void fetch_ahead([[maybe_unused]] const void* here) {
#ifdef __GNUC__
  constexpr uintptr_t kAhead = 4096;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(here) + kAhead));
#endif
}

// The pointers need no alignment, n may be anything.
struct CpuKernels {
  // n weights as float32; int8 without its scale.
  void (*bf16)(const c10::BFloat16* in, int64_t n, float* out);
  void (*fp16)(const c10::Half* in, int64_t n, float* out);
  void (*int8)(const int8_t* in, int64_t n, float* out);
  void (*nf4)(const uint8_t* pairs, int64_t n, float scale, float* out);
  // To nearest even, as ATen rounds.
  void (*round_bf16)(const float* in, int64_t n, c10::BFloat16* out);
  void (*round_fp16)(const float* in, int64_t n, c10::Half* out);
  void (*scale)(float* values, int64_t n, float a, float b);    // times a, then times b
  void (*add)(const float* x, int64_t n, float a, float* out);  // out += a x
  // Sums of products, added up in float32.
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*int8_dot)(const int8_t* codes, const float* x, int64_t n);  // null in plain C++
  // With products of bfloat16 pairs; null where there are none.
  float (*bf16_dot)(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n);
  // Whole blocks; `x` holds within each block the numbers of even places before those of odd ones.
  float (*nf4_dot)(const uint8_t* pairs, const float* scales, const c10::BFloat16* x, int64_t blocks);
};
const CpuKernels& cpu_kernels(Isa isa = best_isa());

// Of NF4's blocks from `first` on; `out` has room for them, but what is returned may lie elsewhere.
const float* nf4_scales(const cuda::Matrix& matrix, int64_t first, int64_t n, float* out);
// The n weights from element `begin` on.
void decode_nf4(const CpuKernels& kernels, const cuda::Matrix& matrix, int64_t begin, int64_t n, float* out);

// The n numbers of `data` from its element `begin` on: in `out`, or where they lie if they are float32. dtype: float32,
// bfloat16 or float16, here and below.
const float* load_floats(const CpuKernels& kernels, const void* data, int64_t begin, int64_t n, at::ScalarType dtype,
                         float* out);
// The n values into `data` from its element `begin` on.
void store_rounded(const CpuKernels& kernels, const float* values, int64_t n, void* data, int64_t begin,
                   at::ScalarType dtype);

// fn(begin, end) of parts of 0 … n, at least `grain` items each, in libtorch's own threads: at::parallel_for runs in
// one thread unless the file that calls it is compiled for OpenMP.
void parallel_ranges(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& fn);

}  // namespace martlet
