#include "core/base/cuda_kernels.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

#include "core/base/error.h"

namespace martlet {
namespace {

const cuda::Kernels* kernels = nullptr;
std::string error = "no CUDA device is used";

const cuda::Kernels* open() {
  // To find out whether a difference is theirs.
  if (const char* wanted = std::getenv("MARTLET_CUDA_KERNELS"); wanted != nullptr && std::string(wanted) == "0") {
    error = "they are switched off (MARTLET_CUDA_KERNELS=0)";
    return nullptr;
  }
  Dl_info self;
  if (::dladdr(reinterpret_cast<const void*>(&open_cuda_kernels), &self) == 0 || self.dli_fname == nullptr) {
    error = "the addon's own path is not known";
    return nullptr;
  }
  const std::filesystem::path library = std::filesystem::path(self.dli_fname).parent_path() / "martlet_cuda.so";
  if (!std::filesystem::exists(library)) {
    error = library.string() + " is not there: the addon was built without nvcc";
    return nullptr;
  }
  void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* entry = handle == nullptr ? nullptr : ::dlsym(handle, cuda::kEntryPoint);
  if (entry == nullptr) {
    error = ::dlerror();
    return nullptr;
  }
  error.clear();
  return reinterpret_cast<cuda::EntryPoint>(entry)();
}

}  // namespace

void open_cuda_kernels() { kernels = open(); }

const std::string& cuda_kernels_error() { return error; }

const cuda::Kernels* cuda_kernels(const at::Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  return x.is_cuda() && (dtype == at::kBFloat16 || dtype == at::kHalf) ? kernels : nullptr;
}

cuda::Type cuda_type(at::ScalarType dtype) { return dtype == at::kHalf ? cuda::Type::kHalf : cuda::Type::kBFloat16; }

void* cuda_stream(const at::Tensor& x) {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(x.device()).native_handle();
}

void check_cuda(cuda::Status status) {
  if (status != nullptr) fail(code::kInternal, std::string("A CUDA kernel could not be started: ") + status);
}

}  // namespace martlet
