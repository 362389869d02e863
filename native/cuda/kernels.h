// CUDA kernels behind plain C functions, in a library of their own (martlet_cuda.so) that is opened only where a GPU
// is. No torch in it: nvcc compiles it alone. Each kernel's reference is the ATen expression beside its caller, and
// native/test/cuda/ compares the two on a GPU, gradients too.
#pragma once

#include <cstdint>

#include "cuda/decode.h"

namespace martlet::cuda {

// Of a kernel's 16-bit tensors; arithmetic is in float32.
enum class Type : int32_t { kHalf = 0, kBFloat16 = 1 };

// All functions enqueue on `stream` (a cudaStream_t of the current device) and return null, or what CUDA says is wrong.
using Status = const char*;

// Where a kernel puts the rows that it writes as e4m3 too, as fp8_quantize_rows() makes them of those rows (which have
// a multiple of 16 columns).
struct Fp8Codes {
  const float* factors = nullptr;  // [columns], multiplied by first; or null
  void* codes = nullptr;           // [rows, columns], contiguous; null: they are not wanted
  float* scales = nullptr;         // [rows]
};

// y and dx may not overlap their inputs, but for those that are named.
struct RmsNorm {
  const void *x, *weight;  // [rows, columns] without gaps, [columns]
  int64_t rows;
  int32_t columns;
  Type type;
  int64_t out_pitch;           // of the rows of y, or of dx in the backward
  int64_t residual_pitch = 0;  // of those of residual
  Fp8Codes y_codes = {};       // of y, in the forward
};

struct Rotary {
  const void* x;          // [tokens, heads, head_dim], the last axis contiguous
  const void *cos, *sin;  // [tokens, head_dim / 2], contiguous
  void* out;              // of x's shape, the last axis contiguous; may be x itself
  int64_t tokens, token_stride, head_stride;
  int64_t out_token_stride, out_head_stride;
  int32_t heads, head_dim;
  Type type;
  bool float_table;  // the table is float32 (one rounding, at the end), else of x's type (each product rounded)
  bool inverse;      // by −θ: the gradient
};

// Table of the QLoRA paper's appendix E, as bitsandbytes has it; on both sides, so that codes mean the same.
struct Nf4Codes {
  float values[16];
};
inline constexpr Nf4Codes kNf4Codes = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};

struct Nf4 {
  const uint8_t* codes;  // two of 4 bits a byte, the first in the upper half
  const void* scales;    // one of each 64 elements: float32, or codes of 8 bits if nested_map is given
  const float* nested_map;
  const float* nested_scales;  // one of each 256 scales
  float nested_offset;
  int64_t rows;
  int32_t columns;
  int64_t out_pitch;  // of the rows of the 16-bit numbers
  Type type;
};

struct Int8 {
  const int8_t* codes;  // [rows, columns]
  const float* scales;  // [rows]: the absolute maximum, which 127 stands for
  int64_t rows;
  int32_t columns;
  int64_t out_pitch;
  Type type;
};

// Rows to 8-bit floats, with one scale each.
struct Fp8Rows {
  const void* x;  // [rows, columns], rows `pitch` apart
  int64_t pitch;
  const float* factors;  // [columns], multiplied by first; or null
  void* codes;           // [rows, columns], contiguous
  float* scales;         // [rows]
  int64_t rows;
  int32_t columns;  // a multiple of 16
  Type type;
  bool e5m2;  // else e4m3
};

// A LoRA pair of a stack of linears: B is [columns, rank].
struct PairGradient {
  int32_t column, columns;  // of dy
  int32_t rank_begin, rank;
  float scaling;
  void* gradient;  // of B, [columns, rank], contiguous: added to
};
struct PairGradients {
  PairGradient parts[3];
  int32_t count;
  const void* dy;  // [rows, columns], rows dy_pitch apart
  void* tail;      // [rows, ranks], rows dy_pitch apart; may be null
  int64_t rows, columns, dy_pitch;
  const void* low;  // x Aᵀ, [rows, ranks], contiguous
  void* dlow;       // of that shape; may be low itself
  const void*
      scaled_b;  // [columns, ranks], rows b_pitch apart: each pair's s B in its own rows and columns, else zeros
  int64_t b_pitch;
  int32_t ranks;
  Type type;
  float* partial_tail;  // scratch
  float* partial_db;    // set within
};

// What a product with a pair beside its weights, or after their codes, reads.
struct PairCopy {
  const void *a, *b;  // [rank, in] and [rows, rank], contiguous
  void *to_a, *to_b;  // of those shapes, rows a_pitch and b_pitch apart; to_b is scaling · b
  int64_t a_pitch, b_pitch;
  int32_t rank, in, rows;  // rank · in and rows · rank below 2³¹
  float scaling;
};
struct Sum {
  void* to;
  const void* from;
  int32_t n;
};
constexpr int32_t kMaxPairs = 16;  // of one call

struct CrossEntropy {
  void* logits;            // [rows, columns], contiguous
  const int64_t* targets;  // [rows], each in [0, columns)
  int64_t rows;
  int32_t columns;
  Type type;
};

struct Kernels {
  // y = x · rstd rounded to 16 bits, times the weight; rstd (float32, [rows]) may be null.
  Status (*rms_norm)(const RmsNorm& op, double eps, void* y, float* rstd, void* stream);
  Status (*rms_norm_backward)(const RmsNorm& op, const void* dy, const float* rstd, void* dx, void* stream);
  // sum += x, rounded; then y and rstd are those of the sum.
  Status (*add_rms_norm)(const RmsNorm& op, void* sum, double eps, void* y, float* rstd, void* stream);
  // dx = residual + the gradient of x, which is rounded before; dx may be residual itself. Puts y in place of dy.
  Status (*rms_norm_backward_add)(const RmsNorm& op, void* dy, const float* rstd, const void* residual, void* dx,
                                  void* stream);
  Status (*rotary)(const Rotary& op, void* stream);
  // out = silu(gate) rounded, times up. n elements, contiguous.
  Status (*swiglu)(const void* gate, const void* up, void* out, int64_t n, Type type, void* stream);
  Status (*swiglu_backward)(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n,
                            Type type, void* stream);
  // The same of halves of rows: gate_up is [rows, 2 · columns], out and dy are [rows, columns], rows `pitch` and
  // `out_pitch` apart. The backward puts both gradients in place of gate_up, and what the forward gave in place of dy.
  // `codes`: of out, or of the gradients.
  Status (*swiglu_halves)(const void* gate_up, int64_t pitch, void* out, int64_t out_pitch, int64_t rows,
                          int32_t columns, Type type, const Fp8Codes& codes, void* stream);
  Status (*swiglu_halves_backward)(void* gate_up, int64_t pitch, void* dy, int64_t out_pitch, int64_t rows,
                                   int32_t columns, Type type, const Fp8Codes& codes, void* stream);
  // Each row's (1 − smoothing) · −log p(target) + smoothing · the mean of −log p over its columns, float32, and whether
  // the target is the first of its largest logits. With `gradient`, scale · the gradient is put in place of the logits.
  Status (*cross_entropy)(const CrossEntropy& op, float scale, float smoothing, bool gradient, float* losses,
                          bool* correct, void* stream);
  // out = x · sigmoid(1.702 x), each product and the sigmoid rounded. n numbers; out may be x.
  Status (*quick_gelu)(const void* x, void* out, int64_t n, Type type, void* stream);
  Status (*nf4_dequantize)(const Nf4& op, void* out, void* stream);
  Status (*int8_dequantize)(const Int8& op, void* out, void* stream);
  // With one reading of dy: adds s · dyᵀ · low to each pair's gradient of B, and puts dy · (s B) into dlow and tail.
  // How many float32 of scratch it needs; 0: it does not take these (ranks other than 8 and 16, or not all of one).
  Status (*pair_gradients_scratch)(const PairGradients& op, int64_t* numbers);
  Status (*pair_gradients)(const PairGradients& op, void* stream);
  Status (*copy_pairs)(const PairCopy* pairs, int32_t count, Type type, void* stream);
  // to += from
  Status (*add_sums)(const Sum* sums, int32_t count, Type type, void* stream);
  // Rows of `bytes` bytes from one pitch to another, both in bytes.
  Status (*copy_rows)(const void* x, int64_t pitch, void* out, int64_t out_pitch, int64_t bytes, int64_t rows,
                      void* stream);
  // Major · 10 + minor of the current device.
  Status (*compute_capability)(int32_t* capability);
  Status (*fp8_quantize_rows)(const Fp8Rows& op, void* stream);
  // [rows, columns] of one byte each to [columns, rows]; both multiples of 4.
  Status (*transpose_bytes)(const void* x, void* out, int64_t rows, int64_t columns, void* stream);
  DecodeKernels decode;
};

// The only symbol of the library; its name changes with the struct, so that an old library is never called wrongly.
inline constexpr const char* kEntryPoint = "martlet_cuda_kernels_10";
using EntryPoint = const Kernels* (*)();

}  // namespace martlet::cuda
