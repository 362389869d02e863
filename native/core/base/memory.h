// How much memory a device holds for this process.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace martlet {

// Bytes. On the CPU all four come from the process's resident set (the peak since the process began).
struct MemoryStats {
  int64_t allocated = 0, peak_allocated = 0, reserved = 0, peak_reserved = 0;
};

MemoryStats memory_stats(c10::Device device);
void reset_peak_memory(c10::Device device);
void empty_cache(c10::Device device);
// Gives memory that was freed back to the system: after large temporaries the C library's heap keeps it.
void trim_heap();
// Waits until the device has done what was queued. Nothing on the CPU.
void synchronize(c10::Device device);
// {free, total}; of the machine's memory on the CPU.
struct MemoryInfo {
  int64_t free = 0, total = 0;
};
MemoryInfo memory_info(c10::Device device);

}  // namespace martlet
