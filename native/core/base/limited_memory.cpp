#include "core/base/limited_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstring>

namespace martlet {
namespace {

// In front of each block, so that its size is known when it is freed; keeps torch's alignment.
constexpr size_t kHeader = c10::gAlignment;

class LimitedAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const size_t now = used_.fetch_add(size) + size;
    if (now > limit_.load()) {
      used_.fetch_sub(size);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CPU memory limit: tried to allocate ", size, " bytes, ", now - size,
                       " of ", limit_.load(), " are in use.");
    }
    size_t peak = peak_.load();
    while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
    }
    auto* block = static_cast<char*>(c10::alloc_cpu(size + kHeader));
    std::memcpy(block, &size, sizeof size);
    void* data = block + kHeader;
    return {data, data, &free_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }

  std::atomic<size_t> used_{0}, peak_{0}, limit_{0};

 private:
  static void free_block(void* data);
};

LimitedAllocator allocator;
bool limited = false;

void LimitedAllocator::free_block(void* data) {
  if (data == nullptr) return;
  char* block = static_cast<char*>(data) - kHeader;
  size_t size;
  std::memcpy(&size, block, sizeof size);
  allocator.used_.fetch_sub(size);
  c10::free_cpu(block);
}

}  // namespace

void limit_cpu_memory(size_t bytes) {
  if (bytes == 0) return;
  allocator.limit_ = bytes;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
  limited = true;
}

bool cpu_memory_is_limited() { return limited; }

MemoryStats limited_memory_stats() {
  const auto used = static_cast<int64_t>(allocator.used_.load()), peak = static_cast<int64_t>(allocator.peak_.load());
  return {used, peak, used, peak};
}

void reset_limited_memory_peak() { allocator.peak_ = allocator.used_.load(); }

}  // namespace martlet
