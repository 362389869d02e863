// What the products of decode.cu and batch_products.cu share.
#pragma once

#include "cuda/vector.cuh"

namespace martlet::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;

namespace {

__constant__ Nf4Codes codes_on_device = kNf4Codes;

struct Parts {
  Matrix matrix[3];
};

__device__ inline float nf4_scale(const Matrix& m, uint8_t code, float nested_scale) {
  return __fadd_rn(__fmul_rn(__ldg(m.nested_map + code), nested_scale), m.nested_offset);
}

__device__ inline float nf4_scale(const Matrix& m, int64_t block) {
  if (m.nested_map == nullptr) return static_cast<const float*>(m.scales)[block];
  return nf4_scale(m, static_cast<const uint8_t*>(m.scales)[block], __ldg(m.nested_scales + block / 256));
}

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1.0f + expf(-1.702f * x));
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kRelu:
      return isnan(x) ? x : fmaxf(x, 0.0f);
    case Activation::kNone:
      break;
  }
  return x;
}

}  // namespace

// op.batch rows, 2 to kMaxBatch, of an x that is normed already.
Status enqueue_products(const Matvec& op, Type type, void* stream);

}  // namespace martlet::cuda
