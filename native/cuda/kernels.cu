#include "cuda/vector.cuh"

namespace martlet::cuda {

Status compute_capability(int32_t* capability) {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *capability = major * 10 + minor;
  return status();
}

}  // namespace martlet::cuda

extern "C" __attribute__((visibility("default"))) const martlet::cuda::Kernels* martlet_cuda_kernels_9() {
  using namespace martlet::cuda;
  static const Kernels kernels = {
      rms_norm,       rms_norm_backward, add_rms_norm,       rms_norm_backward_add,  rotary,
      swiglu,         swiglu_backward,   swiglu_halves,      swiglu_halves_backward, cross_entropy,
      nf4_dequantize, int8_dequantize,   compute_capability, fp8_quantize_rows,      transpose_bytes,
      decode_kernels};
  return &kernels;
}
