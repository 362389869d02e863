// The only place that knows differences between the libtorch versions supported (2.11 to 2.14).
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <torch/version.h>

#include "core/base/memory.h"

namespace martlet {

inline MemoryInfo device_memory_info(c10::Device device) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 12
  const auto [free, total] = c10::getDeviceAllocator(device.type())->getMemoryInfo(device.index());
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
#else
  // 2.11 has no such call on the allocator interface; what this process reserved is all that can be told.
  (void)device;
  return {};
#endif
}

}  // namespace martlet
