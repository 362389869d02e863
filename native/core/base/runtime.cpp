#include "core/base/runtime.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/version.h>

#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <nlohmann/json.hpp>

#include "core/base/cuda_kernels.h"
#include "core/base/error.h"
#include "core/base/limited_memory.h"
#include "core/base/memory.h"
#include "core/session.h"

namespace martlet {
namespace {

std::mutex mutex;
bool initialized = false;
ThreadCounts thread_counts;
std::string cuda_error;  // why CUDA cannot be used; empty when it can

// Counts devices without asking before the libraries are there: at::hasCUDA() remembers its first answer.
int cuda_devices() {
  if (!cuda_error.empty()) return 0;
  try {
    return at::globalContext().hasCUDA()
               ? static_cast<int>(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).deviceCount())
               : 0;
  } catch (const std::exception&) {
    return 0;
  }
}

}  // namespace

void initialize_runtime(const std::string& libtorch_lib, bool cuda, ThreadCounts threads) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (initialized) return;
  initialized = true;
  const std::filesystem::path library = std::filesystem::path(libtorch_lib) / "libtorch_cuda.so";
  if (!cuda) {
    cuda_error = "CUDA was switched off (MARTLET_DEVICE=cpu)";
  } else if (!std::filesystem::exists(library)) {
    cuda_error = "the libtorch in " + libtorch_lib + " is the CPU build";
  } else if (::dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    cuda_error = std::string("libtorch_cuda.so could not be loaded: ") + ::dlerror();
  } else if (cuda_devices() == 0) {
    cuda_error = "no CUDA device or driver was found (is nvidia-smi working?)";
  } else {
    open_cuda_kernels();
  }
  if (const char* limit = std::getenv("MARTLET_CPU_MEMORY_LIMIT")) limit_cpu_memory(std::strtoull(limit, nullptr, 10));
  thread_counts = threads;
  use_threads(at::kCPU);
  at::set_num_interop_threads(1);
}

void use_threads(at::Device device) {
  const int threads = device.is_cpu() ? thread_counts.cpu : thread_counts.beside_gpu;
  if (threads > 0) at::set_num_threads(threads);
}

void set_deterministic(bool on) {
  // What libtorch asks for before it calls cuBLAS deterministic. Only for that time: while the variable is set,
  // libtorch reads it with a regular expression, twice in each matrix product (2.11: about 60 us of host time for each
  // product, measured).
  constexpr const char* kVariable = "CUBLAS_WORKSPACE_CONFIG";
  static bool own = false;
  if (on && std::getenv(kVariable) == nullptr) {
    ::setenv(kVariable, ":4096:8", /*overwrite=*/0);
    own = true;
  } else if (!on && own) {
    ::unsetenv(kVariable);
    own = false;
  }
  at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
}

c10::Device parse_device(const std::string& name) {
  const int count = cuda_devices();
  if (name == "cpu" || (name == "auto" && count == 0)) return c10::Device(c10::DeviceType::CPU);
  if (name == "auto" || name == "cuda") {
    if (count > 0) return c10::Device(c10::DeviceType::CUDA, 0);
  } else if (name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.size() < 9 &&
             name.find_first_not_of("0123456789", 5) == std::string::npos) {
    const int index = std::stoi(name.substr(5));
    if (index < count) return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
    if (count > 0) {
      fail(code::kCudaUnavailable,
           "The device " + name + " was asked for, but there are " + std::to_string(count) + " CUDA device(s).",
           {{"device", name}, {"count", count}});
    }
  } else {
    fail(code::kUsage, "device \"" + name + "\" is not known; use auto, cpu, cuda or cuda:N.", {{"device", name}});
  }
  fail(code::kCudaUnavailable,
       "The device " + name + " was asked for, but " + cuda_error +
           ". Use device: cpu, or install the CUDA build with `martlet libtorch install --cuda`.",
       {{"device", name}, {"reason", cuda_error}});
}

std::string system_info_json() {
  using nlohmann::json;
  const MemoryInfo host = memory_info(c10::Device(c10::DeviceType::CPU));
  json devices =
      json::array({{{"name", "cpu"}, {"description", "CPU"}, {"totalMemory", host.total}, {"freeMemory", host.free}}});
  const int count = cuda_devices();
  for (int i = 0; i < count; ++i) {
    const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(i));
    const MemoryInfo info = memory_info(device);
    devices.push_back(
        {{"name", device.str()}, {"description", "CUDA"}, {"totalMemory", info.total}, {"freeMemory", info.free}});
  }
  json out = {{"torchVersion", TORCH_VERSION},    {"compiledTorchVersion", TORCH_VERSION},
              {"cudaAvailable", count > 0},       {"devices", devices},
              {"threads", at::get_num_threads()}, {"cpuCapability", at::get_cpu_capability()}};
  if (!cuda_error.empty()) out["cudaError"] = cuda_error;
  if (count > 0) {
    out["cudaKernels"] = cuda_kernels_error().empty();
    if (!cuda_kernels_error().empty()) out["cudaKernelsError"] = cuda_kernels_error();
  }
  return out.dump();
}

const char* compiled_torch_version() { return TORCH_VERSION; }

}  // namespace martlet
