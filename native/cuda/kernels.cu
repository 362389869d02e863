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

Status copy_rows(const void* x, int64_t pitch, void* out, int64_t out_pitch, int64_t bytes, int64_t rows,
                 void* stream) {
  cudaMemcpy2DAsync(out, static_cast<size_t>(out_pitch), x, static_cast<size_t>(pitch), static_cast<size_t>(bytes),
                    static_cast<size_t>(rows), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
  return status();
}

}  // namespace martlet::cuda

extern "C" __attribute__((visibility("default"))) const martlet::cuda::Kernels* martlet_cuda_kernels_10() {
  using namespace martlet::cuda;
  static const Kernels kernels = {
      rms_norm,        rms_norm_backward, add_rms_norm,    rms_norm_backward_add,  rotary,
      swiglu,          swiglu_backward,   swiglu_halves,   swiglu_halves_backward, cross_entropy,
      quick_gelu,      nf4_dequantize,    int8_dequantize, pair_gradients_scratch, pair_gradients,
      copy_pairs,      add_sums,          copy_rows,       compute_capability,     fp8_quantize_rows,
      transpose_bytes, decode_kernels};
  return &kernels;
}
