// The kernels of native/cuda, called on ATen's tensors. Where there are none (no GPU, no martlet_cuda.so beside the
// addon, MARTLET_CUDA_KERNELS=0) the callers compute the same with ATen's operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "cuda/kernels.h"

namespace martlet {

// Opens martlet_cuda.so beside this binary; once, when a CUDA device is known to be there.
void open_cuda_kernels();
// Why there are no kernels; empty when they are there.
const std::string& cuda_kernels_error();

// Null unless there are kernels that take tensors of this kind: on a CUDA device, 16-bit.
const cuda::Kernels* cuda_kernels(const at::Tensor& x);
cuda::Type cuda_type(at::ScalarType dtype);
// The current stream of the tensor's device.
void* cuda_stream(const at::Tensor& x);
// Throws what a kernel's launch answered.
void check_cuda(cuda::Status status);

}  // namespace martlet
