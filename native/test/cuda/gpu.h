#pragma once

#include <c10/core/Device.h>
#include <dlfcn.h>
#include <link.h>

#include <filesystem>

#include "core/session.h"

namespace martlet::test {

// With libtorch's CUDA half and the kernels loaded.
inline at::Device gpu() {
  static const at::Device device = [] {
    link_map* torch = nullptr;
    ::dlinfo(::dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD), RTLD_DI_LINKMAP, &torch);
    initialize_runtime(std::filesystem::path(torch->l_name).parent_path(), /*cuda=*/true, {.cpu = 4, .beside_gpu = 4});
    return at::Device(at::kCUDA, 0);
  }();
  return device;
}

}  // namespace martlet::test
