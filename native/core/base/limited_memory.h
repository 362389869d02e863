// A ceiling on the CPU tensors of this process: for tests of memory shortage, and for shared machines. On once
// MARTLET_CPU_MEMORY_LIMIT (bytes) is set when the runtime starts; it also counts what is allocated, exactly.
#pragma once

#include <cstddef>

#include "core/base/memory.h"

namespace martlet {

// 0 = none. Call before any tensor is made.
void limit_cpu_memory(size_t bytes);
bool cpu_memory_is_limited();
// Of tensors made since.
MemoryStats limited_memory_stats();
void reset_limited_memory_peak();

}  // namespace martlet
