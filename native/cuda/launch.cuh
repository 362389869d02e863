// Kernels that follow each other on a stream: from compute capability 9.0 on the next one's blocks start while the last
// of the kernel before are at work (programmatic dependent launch), which hides what a launch costs.
//
// Every kernel that launch() starts calls wait_for_earlier() in all its blocks, before it reads what an earlier kernel
// wrote or writes what one may read: the next relies on it, as it waits for this one only. What no kernel writes, such
// as weights, may be read before. A kernel that is launched plainly waits for all before it and needs nothing.
#pragma once

#include "cuda/vector.cuh"

namespace martlet::cuda {

// Until the kernels before this one have ended and what they wrote is seen.
__device__ inline void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start where there is room, once all blocks of this one have called this or ended.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What CUDA says is wrong, status() finds.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  // As it was compiled: code for older GPUs does not wait.
  cudaFuncAttributes compiled = {};
  const bool waits = cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = waits ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace martlet::cuda
