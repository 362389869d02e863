#include "core/nn/matvec.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "cuda/decode.h"
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

using cuda::Matrix;
using cuda::Storage;

// Of NF4: elements that share a scale, scales that share one.
constexpr int64_t kBlock = 64, kScaleBlock = 256;
// Weights that are decoded at a time, a multiple of the block: 4 KB of float32, which the first-level cache keeps.
constexpr int64_t kPiece = 1024;
// Bytes of the weights that are fetched before they are needed: while a piece is worked on, memory would rest.
constexpr int64_t kAhead = 4096;

// n weights as float32, and the sum of products of float32. The pointers need no alignment, n may be anything.
struct Kernels {
  void (*bf16)(const c10::BFloat16* in, int64_t n, float* out);
  void (*fp16)(const c10::Half* in, int64_t n, float* out);
  void (*int8)(const int8_t* in, int64_t n, float* out);
  void (*nf4)(const uint8_t* pairs, int64_t n, float scale, float* out);
  float (*dot)(const float* a, const float* b, int64_t n);
  // With products of bfloat16 pairs; null where there are none.
  float (*bf16_dot)(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n);
  // Whole blocks; `x` as nf4_order() gives it.
  float (*nf4_dot)(const uint8_t* pairs, const float* scales, const c10::BFloat16* x, int64_t blocks);
};

// ---- plain C++

template <typename T>
void plain_decode(const T* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
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

constexpr Kernels kPlainKernels = {
    plain_decode<c10::BFloat16>, plain_decode<c10::Half>, plain_decode<int8_t>, plain_nf4, plain_dot, nullptr, nullptr};

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

MARTLET_AVX2 void avx2_int8(const int8_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i)));
    _mm256_storeu_ps(out + i, _mm256_cvtepi32_ps(codes));
  }
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

constexpr Kernels kAvx2Kernels = {avx2_bf16, avx2_fp16, avx2_int8, avx2_nf4, avx2_dot, nullptr, nullptr};

// ---- AVX-512: 16 numbers at a time, a mask for the rest

__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }  // n < 16

MARTLET_AVX512 inline __m512 from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MARTLET_AVX512 inline __m512 from_int8(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

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
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
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

constexpr Kernels kAvx512Kernels = {avx512_bf16, avx512_fp16, avx512_int8, avx512_nf4, avx512_dot, nullptr, nullptr};

// ---- AVX-512 with BF16: sums of two products of bfloat16 at a time

MARTLET_AVX512_BF16 float avx512_bf16_dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n) {
  const auto* p = reinterpret_cast<const uint16_t*>(a);
  const auto* q = reinterpret_cast<const uint16_t*>(b);
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
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
  // Twice, since the permutation reads 5 bits of a code and the fifth belongs to another.
  alignas(64) c10::BFloat16 codes[32];
  for (int64_t i = 0; i < 32; ++i) codes[i] = cuda::kNf4Codes.values[i % 16];
  const __m512i table = _mm512_load_si512(codes);
  const auto* numbers = reinterpret_cast<const uint16_t*>(x);
  __m512 s0 = _mm512_setzero_ps(), s1 = s0;
  int64_t i = 0;
  for (; i + 2 <= blocks; i += 2) {
    s0 = add_nf4_block(s0, pairs + i * kBlock / 2, scales[i], numbers + i * kBlock, table);
    s1 = add_nf4_block(s1, pairs + (i + 1) * kBlock / 2, scales[i + 1], numbers + (i + 1) * kBlock, table);
  }
  if (i < blocks) s0 = add_nf4_block(s0, pairs + i * kBlock / 2, scales[i], numbers + i * kBlock, table);
  return _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
}

constexpr Kernels kAvx512Bf16Kernels = {avx512_bf16, avx512_fp16,     avx512_int8,   avx512_nf4,
                                        avx512_dot,  avx512_bf16_dot, avx512_nf4_dot};

#endif  // MARTLET_X86

const Kernels& kernels_for([[maybe_unused]] Isa isa) {
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

// ---- one product

float number(const void* data, int64_t i, at::ScalarType dtype) {
  if (dtype == at::kFloat) return static_cast<const float*>(data)[i];
  if (dtype == at::kHalf) return static_cast<const c10::Half*>(data)[i];
  return static_cast<const c10::BFloat16*>(data)[i];
}

void store(void* data, int64_t i, at::ScalarType dtype, float value) {
  if (dtype == at::kFloat) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == at::kHalf) {
    static_cast<c10::Half*>(data)[i] = value;
  } else {
    static_cast<c10::BFloat16*>(data)[i] = value;
  }
}

// Within each block the numbers of even places before those of odd ones: nf4_dot reads the codes so.
at::Tensor nf4_order(const at::Tensor& x) {
  return x.view({x.size(0), -1, kBlock / 2, 2}).transpose(2, 3).contiguous();
}

// The `bytes` that lie kAhead behind `here`. Past the end of the weights nothing is fetched.
void fetch_ahead([[maybe_unused]] const void* here, [[maybe_unused]] int64_t bytes) {
#ifdef __GNUC__
  const auto address = reinterpret_cast<uintptr_t>(here) + kAhead;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + i));
#endif
}

class Product {
 public:
  Product(const at::Tensor& x, const Matrix& weight, Isa isa)
      : weight_(weight), kernels_(kernels_for(isa)), dtype_(x.scalar_type()), rows_(x.size(0)), columns_(x.size(1)) {
    const bool pairs = dtype_ == at::kBFloat16;
    if (pairs && weight.storage == Storage::kDense && kernels_.bf16_dot != nullptr) {
      form_ = Form::kBf16Pairs;
      x_ = x.contiguous();
    } else if (pairs && weight.storage == Storage::kNf4 && kernels_.nf4_dot != nullptr && columns_ % kBlock == 0) {
      form_ = Form::kNf4Blocks;
      x_ = nf4_order(x.contiguous());
    } else {
      x_ = x.to(at::kFloat).contiguous();
    }
    if (weight.outliers > 0) {
      const at::Tensor places =
          at::from_blob(const_cast<int64_t*>(weight.outlier_columns), {weight.outliers}, at::kLong);
      x_outliers_ = x.index_select(1, places).to(at::kFloat);
    }
  }

  // Rows [begin, end) of the weight; y: [rows of x, rows of the weight].
  void run(int64_t begin, int64_t end, void* y) const {
    std::vector<float> piece(form_ == Form::kBf16Pairs ? 0 : std::max(kPiece, columns_ / kBlock));
    std::array<float, kMatvecRows> sums;
    for (int64_t row = begin; row < end; ++row) {
      multiply(row, piece.data(), sums.data());
      for (int64_t r = 0; r < rows_; ++r) {
        const float bias = weight_.bias == nullptr ? 0 : number(weight_.bias, row, dtype_);
        store(y, r * weight_.rows + row, dtype_, sums[r] + bias);
      }
    }
  }

 private:
  enum class Form { kDecoded, kBf16Pairs, kNf4Blocks };

  // One row of the weight times each row of x.
  void multiply(int64_t row, float* piece, float* sums) const {
    if (form_ == Form::kBf16Pairs) {
      const auto* own = static_cast<const c10::BFloat16*>(weight_.weight) + row * columns_;
      const auto* x = x_.const_data_ptr<c10::BFloat16>();
      fetch_ahead(own, columns_ * 2);
      for (int64_t r = 0; r < rows_; ++r) sums[r] = kernels_.bf16_dot(own, x + r * columns_, columns_);
      return;
    }
    if (form_ == Form::kNf4Blocks) {
      const int64_t blocks = columns_ / kBlock, first = row * blocks;
      const auto* codes = static_cast<const uint8_t*>(weight_.weight) + row * columns_ / 2;
      const auto* x = x_.const_data_ptr<c10::BFloat16>();
      fetch_ahead(codes, columns_ / 2);
      const float* scales = block_scales(first, blocks, piece);
      for (int64_t r = 0; r < rows_; ++r) sums[r] = kernels_.nf4_dot(codes, scales, x + r * columns_, blocks);
      return;
    }
    const auto* x = x_.const_data_ptr<float>();
    std::fill_n(sums, rows_, 0.0f);
    for (int64_t column = 0; column < columns_; column += kPiece) {
      const int64_t n = std::min(kPiece, columns_ - column);
      const float* decoded = decode(row * columns_ + column, n, piece);
      for (int64_t r = 0; r < rows_; ++r) sums[r] += kernels_.dot(decoded, x + r * columns_ + column, n);
    }
    if (weight_.storage == Storage::kInt8) {
      const float scale = static_cast<const float*>(weight_.scales)[row] / 127.0f;
      for (int64_t r = 0; r < rows_; ++r) sums[r] *= scale;
      add_outliers(row, piece, sums);
    }
  }

  // The n weights from element `begin` on, without int8's scale.
  const float* decode(int64_t begin, int64_t n, float* out) const {
    if (weight_.storage == Storage::kDense) return decode_dense(weight_.weight, begin, n, out);
    if (weight_.storage == Storage::kInt8) {
      const auto* in = static_cast<const int8_t*>(weight_.weight) + begin;
      fetch_ahead(in, n);
      kernels_.int8(in, n, out);
      return out;
    }
    const auto* codes = static_cast<const uint8_t*>(weight_.weight);
    fetch_ahead(codes + begin / 2, n / 2);
    for (int64_t done = 0; done < n;) {
      const int64_t element = begin + done, count = std::min(n - done, kBlock - element % kBlock);
      float own;
      const float scale = *block_scales(element / kBlock, 1, &own);
      // In a matrix of an odd number of columns a row may begin in the middle of a byte.
      const int64_t half = element % 2;
      if (half != 0) out[done] = scale * cuda::kNf4Codes.values[codes[element / 2] & 15];
      kernels_.nf4(codes + (element + half) / 2, count - half, scale, out + done + half);
      done += count;
    }
    return out;
  }

  const float* decode_dense(const void* data, int64_t begin, int64_t n, float* out) const {
    if (dtype_ == at::kFloat) return static_cast<const float*>(data) + begin;
    if (dtype_ == at::kHalf) {
      kernels_.fp16(static_cast<const c10::Half*>(data) + begin, n, out);
    } else {
      kernels_.bf16(static_cast<const c10::BFloat16*>(data) + begin, n, out);
    }
    return out;
  }

  // Of NF4's blocks from `first` on; `out` has room for them.
  const float* block_scales(int64_t first, int64_t n, float* out) const {
    if (weight_.nested_map == nullptr) return static_cast<const float*>(weight_.scales) + first;
    const auto* codes = static_cast<const uint8_t*>(weight_.scales);
    const float *map = weight_.nested_map, *nested = weight_.nested_scales, offset = weight_.nested_offset;
    for (int64_t i = 0; i < n; ++i)
      out[i] = map[codes[first + i]] * nested[static_cast<uint64_t>(first + i) / kScaleBlock] + offset;
    return out;
  }

  void add_outliers(int64_t row, float* piece, float* sums) const {
    for (int64_t begin = 0; begin < weight_.outliers; begin += kPiece) {
      const int64_t n = std::min<int64_t>(kPiece, weight_.outliers - begin);
      const float* values = decode_dense(weight_.outlier_values, row * weight_.outliers + begin, n, piece);
      const auto* x = x_outliers_.const_data_ptr<float>() + begin;
      for (int64_t r = 0; r < rows_; ++r) sums[r] += kernels_.dot(values, x + r * weight_.outliers, n);
    }
  }

  const Matrix& weight_;
  const Kernels& kernels_;
  const at::ScalarType dtype_;
  const int64_t rows_, columns_;
  Form form_ = Form::kDecoded;
  at::Tensor x_;           // [rows, columns]: bfloat16 for products of pairs, else float32
  at::Tensor x_outliers_;  // float32 [rows, outliers]
};

at::Tensor matvec(const at::Tensor& x, Matrix weight, at::IntArrayRef shape, const at::Tensor& bias, Isa isa) {
  TORCH_INTERNAL_ASSERT(x.size(0) <= kMatvecRows && x.size(1) == shape[1]);
  weight.rows = static_cast<int32_t>(shape[0]);
  weight.columns = static_cast<int32_t>(shape[1]);
  const at::Tensor own_bias = bias.defined() ? bias.contiguous() : bias;
  weight.bias = bias.defined() ? own_bias.const_data_ptr() : nullptr;
  at::Tensor y = at::empty({x.size(0), shape[0]}, x.options());
  const Product product(x, weight, isa);
  // at::parallel_for runs in one thread unless the file that calls it is compiled for OpenMP; the iterator's loop runs
  // in libtorch's own threads. 64 K weights are worth waking one.
  at::Tensor first = y[0];
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = static_cast<int64_t>(y.element_size());
  at::TensorIterator rows = at::TensorIterator::borrowing_nullary_op(first);
  rows.for_each(
      [&](char** data, const int64_t*, int64_t n, int64_t) {
        const int64_t begin = (data[0] - out) / size;
        product.run(begin, begin + n, out);
      },
      std::max<int64_t>(1, (int64_t{1} << 16) / shape[1]));
  return y;
}

bool recorded(const at::Tensor& x) { return x.defined() && x.requires_grad(); }

bool takes(const at::Tensor& x, at::ScalarType dtype, const at::Tensor& bias) {
  return x.is_cpu() && x.dim() == 2 && x.size(0) > 0 && x.size(0) <= kMatvecRows && x.scalar_type() == dtype &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         (!bias.defined() || bias.scalar_type() == dtype) &&
         !(at::GradMode::is_enabled() && (recorded(x) || recorded(bias)));
}

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

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

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Isa isa) {
  Matrix matrix = {};
  matrix.storage = Storage::kDense;
  const at::Tensor own = weight.contiguous();
  matrix.weight = own.const_data_ptr();
  return matvec(x, matrix, weight.sizes(), bias, isa);
}

at::Tensor matvec(const at::Tensor& x, const QuantizedTensor& weight, const at::Tensor& bias, Isa isa) {
  Matrix matrix = {};
  weight.describe(matrix);
  return matvec(x, matrix, weight.sizes(), bias, isa);
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  // ATen's own kernels are better than plain C++.
  const bool own = best_isa() != Isa::kPlain && takes(x, weight.scalar_type(), bias) && weight.is_contiguous() &&
                   weight.scalar_type() != at::kFloat && !(at::GradMode::is_enabled() && recorded(weight));
  return own ? matvec(x, weight, bias) : at::linear(x, weight, optional(bias));
}

at::Tensor product(const at::Tensor& x, const QuantizedTensor& weight, const at::Tensor& bias) {
  Matrix matrix = {};
  if (takes(x, weight.dtype(), bias) && weight.describe(matrix))
    return matvec(x, matrix, weight.sizes(), bias, best_isa());
  return weight.linear(x, bias);
}

}  // namespace martlet
