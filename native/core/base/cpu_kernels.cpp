#include "core/base/cpu_kernels.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "cuda/kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics' undefined operands (bug 105593), which they mean to be undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MARTLET_X86 1
// Of each function instead of the whole file: what the compiler makes of inline functions must run everywhere.
#define MARTLET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define MARTLET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define MARTLET_AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#endif

namespace martlet {
namespace {

// ---- plain C++

template <typename T>
void plain_decode(const T* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

template <typename T>
void plain_round(const float* in, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
}

void plain_scale(float* values, int64_t n, float a, float b) {
  for (int64_t i = 0; i < n; ++i) values[i] = values[i] * a * b;
}

void plain_add(const float* x, int64_t n, float a, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] += a * x[i];
}

void plain_nf4(const uint8_t* pairs, int64_t n, float scale, float* out) {
  const float* table = cuda::kNf4Codes.values;
  for (int64_t i = 0; i < n; ++i) out[i] = scale * table[i % 2 == 0 ? pairs[i / 2] >> 4 : pairs[i / 2] & 15];
}

float plain_dot(const float* a, const float* b, int64_t n) {
  std::array<float, 8> sums = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t k = 0; k < 8; ++k) sums[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

constexpr CpuKernels kPlainKernels = {plain_decode<c10::BFloat16>,
                                      plain_decode<c10::Half>,
                                      plain_decode<int8_t>,
                                      plain_nf4,
                                      plain_round<c10::BFloat16>,
                                      plain_round<c10::Half>,
                                      plain_scale,
                                      plain_add,
                                      plain_dot,
                                      nullptr,
                                      nullptr,
                                      nullptr};

#ifdef MARTLET_X86

// ---- AVX2, FMA, F16C: 8 numbers at a time. Scalar code of the SSE kind is slow while the registers' upper halves are
// in use, and the compiler does not clear them before a call in the place of a return.

MARTLET_AVX2 void avx2_bf16(const c10::BFloat16* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  }
  _mm256_zeroupper();
  plain_decode(in + i, n - i, out + i);
}

MARTLET_AVX2 void avx2_fp16(const c10::Half* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  _mm256_zeroupper();
  plain_decode(in + i, n - i, out + i);
}

MARTLET_AVX2 inline __m256 from_8_codes(const int8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

MARTLET_AVX2 void avx2_int8(const int8_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, from_8_codes(in + i));
  _mm256_zeroupper();
  plain_decode(in + i, n - i, out + i);
}

MARTLET_AVX2 void avx2_nf4(const uint8_t* pairs, int64_t n, float scale, float* out) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 below = _mm256_mul_ps(_mm256_loadu_ps(cuda::kNf4Codes.values), factor);
  const __m256 above = _mm256_mul_ps(_mm256_loadu_ps(cuda::kNf4Codes.values + 8), factor);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    int32_t four;
    std::memcpy(&four, pairs + i / 2, sizeof four);
    // A byte a lane of 64 bits; the code of its upper half into the lower 32 of them, the other into the upper.
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i codes = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
    // The permutation reads 3 bits of a code, the choice the fourth, as a sign.
    const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, codes),
                                               _mm256_permutevar8x32_ps(above, codes), choice));
  }
  _mm256_zeroupper();
  plain_nf4(pairs + i / 2, n - i, scale, out + i);
}

MARTLET_AVX2 inline __m256i round_to_bf16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i upper = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(upper, _mm256_set1_epi32(0x7fc0), is_nan);
}

MARTLET_AVX2 void avx2_round_bf16(const float* in, int64_t n, c10::BFloat16* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    // Packed within halves of 128 bits: of 64, the second and the third lie crosswise.
    const __m256i packed =
        _mm256_packus_epi32(round_to_bf16(_mm256_loadu_ps(in + i)), round_to_bf16(_mm256_loadu_ps(in + i + 8)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  _mm256_zeroupper();
  plain_round(in + i, n - i, out + i);
}

MARTLET_AVX2 void avx2_round_fp16(const float* in, int64_t n, c10::Half* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  _mm256_zeroupper();
  plain_round(in + i, n - i, out + i);
}

MARTLET_AVX2 void avx2_scale(float* values, int64_t n, float a, float b) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 by_a = _mm256_mul_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(a));
    _mm256_storeu_ps(values + i, _mm256_mul_ps(by_a, _mm256_set1_ps(b)));
  }
  _mm256_zeroupper();
  plain_scale(values + i, n - i, a, b);
}

MARTLET_AVX2 void avx2_add(const float* x, int64_t n, float a, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(a), _mm256_loadu_ps(out + i));
    _mm256_storeu_ps(out + i, sum);
  }
  _mm256_zeroupper();
  plain_add(x + i, n - i, a, out + i);
}

MARTLET_AVX2 float avx2_dot(const float* a, const float* b, int64_t n) {
  __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    s0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), s0);
    s1 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), s1);
    s2 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 16), _mm256_loadu_ps(b + i + 16), s2);
    s3 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 24), _mm256_loadu_ps(b + i + 24), s3);
  }
  alignas(32) float sums[8];
  _mm256_store_ps(sums, _mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
  _mm256_zeroupper();
  float sum = plain_dot(a + i, b + i, n - i);
  for (const float part : sums) sum += part;
  return sum;
}

MARTLET_AVX2 float avx2_int8_dot(const int8_t* codes, const float* x, int64_t n) {
  __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    if (i % 64 == 0) fetch_ahead(codes + i);
    s0 = _mm256_fmadd_ps(from_8_codes(codes + i), _mm256_loadu_ps(x + i), s0);
    s1 = _mm256_fmadd_ps(from_8_codes(codes + i + 8), _mm256_loadu_ps(x + i + 8), s1);
    s2 = _mm256_fmadd_ps(from_8_codes(codes + i + 16), _mm256_loadu_ps(x + i + 16), s2);
    s3 = _mm256_fmadd_ps(from_8_codes(codes + i + 24), _mm256_loadu_ps(x + i + 24), s3);
  }
  alignas(32) float sums[8];
  _mm256_store_ps(sums, _mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
  _mm256_zeroupper();
  float sum = 0;
  for (; i < n; ++i) sum += static_cast<float>(codes[i]) * x[i];
  for (const float part : sums) sum += part;
  return sum;
}

constexpr CpuKernels kAvx2Kernels = {avx2_bf16,  avx2_fp16, avx2_int8, avx2_nf4,      avx2_round_bf16, avx2_round_fp16,
                                     avx2_scale, avx2_add,  avx2_dot,  avx2_int8_dot, nullptr,         nullptr};

// ---- AVX-512: 16 numbers at a time, a mask for the rest

__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }  // n < 16

MARTLET_AVX512 inline __m512 from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MARTLET_AVX512 inline __m512 from_int8(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

MARTLET_AVX512 inline __m512 from_16_codes(const int8_t* codes) {
  return from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// 8 bytes; as in avx2_nf4, but the permutation reads all 4 bits.
MARTLET_AVX512 inline __m512 from_nf4(__m128i pairs, __m512 table) {
  const __m512i bytes = _mm512_cvtepu8_epi64(pairs);
  return _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32)), table);
}

MARTLET_AVX512 void avx512_bf16(const c10::BFloat16* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  const __mmask16 rest = first_lanes(n - i);
  _mm512_mask_storeu_ps(out + i, rest, from_bf16(_mm256_maskz_loadu_epi16(rest, in + i)));
}

MARTLET_AVX512 void avx512_fp16(const c10::Half* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  const __mmask16 rest = first_lanes(n - i);
  _mm512_mask_storeu_ps(out + i, rest, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, in + i)));
}

MARTLET_AVX512 void avx512_int8(const int8_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, from_16_codes(in + i));
  const __mmask16 rest = first_lanes(n - i);
  _mm512_mask_storeu_ps(out + i, rest, from_int8(_mm_maskz_loadu_epi8(rest, in + i)));
}

MARTLET_AVX512 void avx512_nf4(const uint8_t* pairs, int64_t n, float scale, float* out) {
  const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(cuda::kNf4Codes.values), _mm512_set1_ps(scale));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, from_nf4(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs + i / 2)), table));
  const __mmask16 rest = first_lanes(n - i);
  _mm512_mask_storeu_ps(out + i, rest,
                        from_nf4(_mm_maskz_loadu_epi8(first_lanes((n - i + 1) / 2), pairs + i / 2), table));
}

MARTLET_AVX512 float avx512_dot(const float* a, const float* b, int64_t n) {
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
    s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
    s2 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 32), _mm512_loadu_ps(b + i + 32), s2);
    s3 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 48), _mm512_loadu_ps(b + i + 48), s3);
  }
  for (; i + 16 <= n; i += 16) s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
  const __mmask16 rest = first_lanes(n - i);
  s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(rest, a + i), _mm512_maskz_loadu_ps(rest, b + i), s0);
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

MARTLET_AVX512 inline __m256i round_to_bf16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i upper = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(upper, is_nan, _mm512_set1_epi32(0x7fc0)));
}

MARTLET_AVX512 void avx512_round_bf16(const float* in, int64_t n, c10::BFloat16* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), round_to_bf16(_mm512_loadu_ps(in + i)));
  const __mmask16 rest = first_lanes(n - i);
  _mm256_mask_storeu_epi16(out + i, rest, round_to_bf16(_mm512_maskz_loadu_ps(rest, in + i)));
}

MARTLET_AVX512 void avx512_round_fp16(const float* in, int64_t n, c10::Half* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  const __mmask16 rest = first_lanes(n - i);
  _mm256_mask_storeu_epi16(out + i, rest,
                           _mm512_cvtps_ph(_mm512_maskz_loadu_ps(rest, in + i), _MM_FROUND_TO_NEAREST_INT));
}

MARTLET_AVX512 void avx512_scale(float* values, int64_t n, float a, float b) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xffff : first_lanes(n - i);
    const __m512 by_a = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), _mm512_set1_ps(a));
    _mm512_mask_storeu_ps(values + i, lanes, _mm512_mul_ps(by_a, _mm512_set1_ps(b)));
  }
}

MARTLET_AVX512 void avx512_add(const float* x, int64_t n, float a, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xffff : first_lanes(n - i);
    const __m512 sum =
        _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_set1_ps(a), _mm512_maskz_loadu_ps(lanes, out + i));
    _mm512_mask_storeu_ps(out + i, lanes, sum);
  }
}

MARTLET_AVX512 float avx512_int8_dot(const int8_t* codes, const float* x, int64_t n) {
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    fetch_ahead(codes + i);
    s0 = _mm512_fmadd_ps(from_16_codes(codes + i), _mm512_loadu_ps(x + i), s0);
    s1 = _mm512_fmadd_ps(from_16_codes(codes + i + 16), _mm512_loadu_ps(x + i + 16), s1);
    s2 = _mm512_fmadd_ps(from_16_codes(codes + i + 32), _mm512_loadu_ps(x + i + 32), s2);
    s3 = _mm512_fmadd_ps(from_16_codes(codes + i + 48), _mm512_loadu_ps(x + i + 48), s3);
  }
  for (; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xffff : first_lanes(n - i);
    s0 = _mm512_fmadd_ps(from_int8(_mm_maskz_loadu_epi8(lanes, codes + i)), _mm512_maskz_loadu_ps(lanes, x + i), s0);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

constexpr CpuKernels kAvx512Kernels = {avx512_bf16,       avx512_fp16,       avx512_int8,  avx512_nf4,
                                       avx512_round_bf16, avx512_round_fp16, avx512_scale, avx512_add,
                                       avx512_dot,        avx512_int8_dot,   nullptr,      nullptr};

// ---- AVX-512 with BF16: sums of two products of bfloat16 at a time

MARTLET_AVX512_BF16 float avx512_bf16_dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n) {
  const auto* p = reinterpret_cast<const uint16_t*>(a);
  const auto* q = reinterpret_cast<const uint16_t*>(b);
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    for (int64_t line = 0; line < 128; line += 32) fetch_ahead(p + i + line);
    s0 = _mm512_dpbf16_ps(s0, (__m512bh)_mm512_loadu_epi16(p + i), (__m512bh)_mm512_loadu_epi16(q + i));
    s1 = _mm512_dpbf16_ps(s1, (__m512bh)_mm512_loadu_epi16(p + i + 32), (__m512bh)_mm512_loadu_epi16(q + i + 32));
    s2 = _mm512_dpbf16_ps(s2, (__m512bh)_mm512_loadu_epi16(p + i + 64), (__m512bh)_mm512_loadu_epi16(q + i + 64));
    s3 = _mm512_dpbf16_ps(s3, (__m512bh)_mm512_loadu_epi16(p + i + 96), (__m512bh)_mm512_loadu_epi16(q + i + 96));
  }
  for (; i < n; i += 32) {
    const __mmask32 lanes = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;
    s0 = _mm512_dpbf16_ps(s0, (__m512bh)_mm512_maskz_loadu_epi16(lanes, p + i),
                          (__m512bh)_mm512_maskz_loadu_epi16(lanes, q + i));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

// NF4's codes as bfloat16, to nearest even; twice, since the permutation reads 5 bits of a code and the fifth belongs
// to another.
alignas(64) constexpr std::array<uint16_t, 32> kNf4Bf16 = [] {
  std::array<uint16_t, 32> out = {};
  for (size_t i = 0; i < out.size(); ++i) {
    const auto bits = std::bit_cast<uint32_t>(cuda::kNf4Codes.values[i % 16]);
    out[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return out;
}();

MARTLET_AVX512_BF16 inline __m512 add_nf4_block(__m512 sum, const uint8_t* pairs, float scale, const uint16_t* x,
                                                __m512i table) {
  // A byte a lane of 16 bits: first the codes of the upper halves, then those of the lower.
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)));
  const __m512i upper = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
  const __m512i lower = _mm512_permutexvar_epi16(bytes, table);
  __m512 own = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)upper, (__m512bh)_mm512_loadu_epi16(x));
  own = _mm512_dpbf16_ps(own, (__m512bh)lower, (__m512bh)_mm512_loadu_epi16(x + 32));
  return _mm512_fmadd_ps(own, _mm512_set1_ps(scale), sum);
}

MARTLET_AVX512_BF16 float avx512_nf4_dot(const uint8_t* pairs, const float* scales, const c10::BFloat16* x,
                                         int64_t blocks) {
  const __m512i table = _mm512_load_si512(kNf4Bf16.data());
  const auto* numbers = reinterpret_cast<const uint16_t*>(x);
  __m512 s0 = _mm512_setzero_ps(), s1 = s0;
  int64_t i = 0;
  for (; i + 2 <= blocks; i += 2) {
    fetch_ahead(pairs + i * kNf4Block / 2);
    s0 = add_nf4_block(s0, pairs + i * kNf4Block / 2, scales[i], numbers + i * kNf4Block, table);
    s1 = add_nf4_block(s1, pairs + (i + 1) * kNf4Block / 2, scales[i + 1], numbers + (i + 1) * kNf4Block, table);
  }
  if (i < blocks) s0 = add_nf4_block(s0, pairs + i * kNf4Block / 2, scales[i], numbers + i * kNf4Block, table);
  return _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
}

constexpr CpuKernels kAvx512Bf16Kernels = {avx512_bf16,       avx512_fp16,       avx512_int8,     avx512_nf4,
                                           avx512_round_bf16, avx512_round_fp16, avx512_scale,    avx512_add,
                                           avx512_dot,        avx512_int8_dot,   avx512_bf16_dot, avx512_nf4_dot};

#endif  // MARTLET_X86

}  // namespace

bool is_supported(Isa isa) {
  if (isa == Isa::kPlain) return true;
#ifdef MARTLET_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 && (isa == Isa::kAvx512 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

Isa best_isa() {
  static const Isa best = [] {
    for (const Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
      if (is_supported(isa)) return isa;
    }
    return Isa::kPlain;
  }();
  return best;
}

const CpuKernels& cpu_kernels([[maybe_unused]] Isa isa) {
#ifdef MARTLET_X86
  switch (isa) {
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kPlain:
      break;
  }
#endif
  return kPlainKernels;
}

const float* nf4_scales(const cuda::Matrix& matrix, int64_t first, int64_t n, float* out) {
  if (matrix.nested_map == nullptr) return static_cast<const float*>(matrix.scales) + first;
  const auto* codes = static_cast<const uint8_t*>(matrix.scales);
  const float *map = matrix.nested_map, offset = matrix.nested_offset;
  for (int64_t i = 0; i < n;) {
    const int64_t group = (first + i) / kNf4ScaleBlock, end = std::min(n, (group + 1) * kNf4ScaleBlock - first);
    const float nested = matrix.nested_scales[group];
    for (; i < end; ++i) out[i] = map[codes[first + i]] * nested + offset;
  }
  return out;
}

void decode_nf4(const CpuKernels& kernels, const cuda::Matrix& matrix, int64_t begin, int64_t n, float* out) {
  const auto* codes = static_cast<const uint8_t*>(matrix.weight);
  for (int64_t byte = 0; byte < n / 2; byte += kCacheLine) fetch_ahead(codes + begin / 2 + byte);
  for (int64_t done = 0; done < n;) {
    const int64_t element = begin + done, count = std::min(n - done, kNf4Block - element % kNf4Block);
    float own;
    const float scale = *nf4_scales(matrix, element / kNf4Block, 1, &own);
    // In a matrix of an odd number of columns a row may begin in the middle of a byte.
    const int64_t half = element % 2;
    if (half != 0) out[done] = scale * cuda::kNf4Codes.values[codes[element / 2] & 15];
    kernels.nf4(codes + (element + half) / 2, count - half, scale, out + done + half);
    done += count;
  }
}

const float* load_floats(const CpuKernels& kernels, const void* data, int64_t begin, int64_t n, at::ScalarType dtype,
                         float* out) {
  if (dtype == at::kFloat) return static_cast<const float*>(data) + begin;
  if (dtype == at::kHalf) {
    kernels.fp16(static_cast<const c10::Half*>(data) + begin, n, out);
  } else {
    kernels.bf16(static_cast<const c10::BFloat16*>(data) + begin, n, out);
  }
  return out;
}

void store_rounded(const CpuKernels& kernels, const float* values, int64_t n, void* data, int64_t begin,
                   at::ScalarType dtype) {
  if (dtype == at::kFloat) {
    std::copy_n(values, n, static_cast<float*>(data) + begin);
  } else if (dtype == at::kHalf) {
    kernels.round_fp16(values, n, static_cast<c10::Half*>(data) + begin);
  } else {
    kernels.round_bf16(values, n, static_cast<c10::BFloat16*>(data) + begin);
  }
}

void parallel_ranges(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& fn) {
  // Its bytes are never touched: their addresses say which of the items a thread has.
  const at::Tensor items = at::empty({n}, at::kByte);
  const auto* first = static_cast<const char*>(items.const_data_ptr());
  at::TensorIterator iterator = at::TensorIterator::borrowing_nullary_op(items);
  iterator.for_each(
      [&](char** data, const int64_t*, int64_t count, int64_t) {
        const int64_t begin = data[0] - first;
        fn(begin, begin + count);
      },
      std::max<int64_t>(1, grain));
}

}  // namespace martlet
