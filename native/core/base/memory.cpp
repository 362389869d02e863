#include "core/base/memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <malloc.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "core/base/limited_memory.h"

namespace martlet {
namespace {

// A line `Name:   123 kB` of /proc files, in bytes; 0 when absent.
int64_t proc_kilobytes(const char* file, const char* name) {
  std::ifstream stream(file);
  std::string line;
  while (std::getline(stream, line)) {
    if (line.rfind(name, 0) == 0) return std::atoll(line.c_str() + std::strlen(name)) * 1024;
  }
  return 0;
}

}  // namespace

MemoryStats memory_stats(c10::Device device) {
  if (device.is_cpu() && cpu_memory_is_limited()) return limited_memory_stats();
  if (device.is_cpu()) {
    const int64_t now = proc_kilobytes("/proc/self/status", "VmRSS:"),
                  peak = proc_kilobytes("/proc/self/status", "VmHWM:");
    return {now, peak, now, peak};
  }
  const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  const auto& allocated = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  const auto& reserved = stats.reserved_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  return {allocated.current, allocated.peak, reserved.current, reserved.peak};
}

void reset_peak_memory(c10::Device device) {
  if (device.is_cpu()) return reset_limited_memory_peak();
  c10::getDeviceAllocator(device.type())->resetPeakStats(device.index());
}

void empty_cache(c10::Device device) {
  if (!device.is_cpu()) c10::getDeviceAllocator(device.type())->emptyCache();
}

void trim_heap() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

void synchronize(c10::Device device) {
  if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
}

MemoryInfo memory_info(c10::Device device) {
  if (!device.is_cpu()) {
    const auto [free, total] = c10::getDeviceAllocator(device.type())->getMemoryInfo(device.index());
    return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
  }
  return {proc_kilobytes("/proc/meminfo", "MemAvailable:"), proc_kilobytes("/proc/meminfo", "MemTotal:")};
}

}  // namespace martlet
