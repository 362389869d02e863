// Products by tensor cores.
#pragma once

#include "cuda/vector.cuh"

namespace martlet::cuda {

// d += a · b, 16 × 16 times 16 × 8, as mma.m16n8k16 has them (g = lane / 4, t = lane % 4). a: rows g and g + 8 of
// columns (2t, 2t + 1), then of (2t + 8, 2t + 9); b: column g of rows (2t, 2t + 1), then of (2t + 8, 2t + 9); d: row g
// of columns 2t and 2t + 1, then row g + 8. Which columns of a matrix those of a are is open, as long as b's rows are
// the same.
template <typename T>
__device__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace martlet::cuda
