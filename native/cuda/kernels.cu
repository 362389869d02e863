#include "cuda/vector.cuh"

extern "C" __attribute__((visibility("default"))) const martlet::cuda::Kernels* martlet_cuda_kernels_7() {
  using namespace martlet::cuda;
  static const Kernels kernels = {
      rms_norm,       rms_norm_backward, add_rms_norm,  rms_norm_backward_add,  rotary,
      swiglu,         swiglu_backward,   swiglu_halves, swiglu_halves_backward, cross_entropy,
      nf4_dequantize, int8_dequantize,   decode_kernels};
  return &kernels;
}
