// What LoRA's backward needs of dy, in one reading of it: the gradients of B, dyᵀ · low, which are sums over rows, and
// dy · (s B), which are sums over columns. A block does some rows of a slice of columns, its warps 128 columns each, 16
// rows at a time, staged through shared memory; both products are of tensor cores. Sums of the blocks meet in a second
// kernel, in a fixed order.
#include "cuda/mma.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStripe = 128;              // columns of a warp
constexpr int kSlice = kWarps * kStripe;  // of a block
constexpr int kStep = 16;                 // rows at a time
constexpr int kGroup = 4;                 // steps whose sums over columns are put together at once
constexpr int kPitch = kStripe * 2 + 16;  // bytes of a staged row: eight of them lie in different banks
constexpr int kTiles = kStripe / 16;

// kTiles · 8 ranks.
__host__ __device__ constexpr int rank_of(int tiles) { return 8 * tiles; }
__host__ __device__ constexpr int stage_bytes(int tiles) { return kStep * (kPitch + rank_of(tiles) * 2); }
constexpr int shared_bytes(int tiles, int stages) {
  return kWarps * (stages * stage_bytes(tiles) + kStripe * rank_of(tiles) * 2 + kGroup * kStep * rank_of(tiles) * 4);
}

__host__ __device__ inline int slices_of(const PairGradient& part) { return (part.columns + kSlice - 1) / kSlice; }

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes, or zeros.
__device__ inline void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Each lane names a row of 8 numbers; a register gets two neighbours of a matrix of 8 × 8, of its transpose with
// kTrans.
template <bool kTrans>
__device__ void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
  }
}
// The same of two; lanes 0 to 15 name the rows.
__device__ inline void load_transposed_pair(uint32_t (&out)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row)));
}

// blocks.x: slices of the parts, one part after the other; blocks.y: `split` rows each. kRanks: tiles of 8 ranks.
template <typename T, int kRanks, int kStages>
__global__ void __launch_bounds__(kThreads, 1) partial_sums(const PairGradients op, int split) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kRank = rank_of(kRanks), kStage = stage_bytes(kRanks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned char* stages = shared + warp * kStages * kStage;
  unsigned char* b_of_stripe = shared + kWarps * kStages * kStage + warp * kStripe * kRank * 2;
  auto* tails = reinterpret_cast<float*>(shared + kWarps * (kStages * kStage + kStripe * kRank * 2));
  int slice = blockIdx.x, index = 0;
  while (slice >= slices_of(op.parts[index])) slice -= slices_of(op.parts[index++]);
  const PairGradient& part = op.parts[index];
  const int stripe = slice * kSlice + warp * kStripe, left = part.columns - stripe;  // none is left of some warps
  const int64_t column0 = int64_t{part.column} + stripe;
  const T *dy = static_cast<const T*>(op.dy) + column0, *low = static_cast<const T*>(op.low) + part.rank_begin,
          *b = static_cast<const T*>(op.scaled_b) + column0 * op.b_pitch + part.rank_begin;
  const int begin = blockIdx.y * split, end = min(begin + split, static_cast<int>(op.rows));
  for (int i = lane; i < kStripe * kRanks; i += 32) {
    const int column = i / kRanks, piece = i % kRanks;
    const bool there = column < left;
    copy_async(b_of_stripe + i * 16, there ? b + column * op.b_pitch + piece * 8 : b, there);
  }
  const auto fetch = [&](int step) {
    unsigned char* to = stages + step % kStages * kStage;
    const int row0 = begin + step * kStep;
#pragma unroll
    for (int n = 0; n < kStep * kStripe / 8 / 32; ++n) {
      const int i = n * 32 + lane, row = i / (kStripe / 8), piece = i % (kStripe / 8);
      const bool there = row0 + row < end && piece * 8 < left;
      copy_async(to + row * kPitch + piece * 16, there ? dy + (row0 + row) * op.dy_pitch + piece * 8 : dy, there);
    }
    if (lane < kStep * kRanks) {
      const int row = lane / kRanks, piece = lane % kRanks;
      const bool there = row0 + row < end;
      copy_async(to + kStep * kPitch + lane * 16, there ? low + int64_t{row0 + row} * op.ranks + piece * 8 : low,
                 there);
    }
    commit_copies();
  };
  const int groups = (end - begin + kGroup * kStep - 1) / (kGroup * kStep);
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  float db[kTiles][kRanks][4] = {};
  for (int step = 0; step < groups * kGroup; ++step) {
    wait_for_copies<kStages - 2>();
    __syncwarp();
    fetch(step + kStages - 1);
    const unsigned char* from = stages + step % kStages * kStage;
    uint32_t of_low[kRanks][2];
    float tail[kRanks][4] = {};
#pragma unroll
    for (int n = 0; n < kRanks; ++n)
      load_transposed_pair(of_low[n], from + kStep * kPitch + (lane % 16 * kRanks + n) * 16);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t rows[4], columns[4];
      // Rows 0 … 7, 8 … 15 of columns 0 … 7, then of 8 … 15.
      load_matrices<false>(rows, from + lane % 16 * kPitch + (tile * 16 + lane / 16 * 8) * 2);
      // Turned round: columns 0 … 7, 8 … 15 of rows 0 … 7, then of 8 … 15.
      load_matrices<true>(columns, from + (lane % 8 + lane / 16 * 8) * kPitch + (tile * 16 + lane / 8 % 2 * 8) * 2);
#pragma unroll
      for (int n = 0; n < kRanks; ++n) {
        uint32_t of_b[2];
        load_transposed_pair(of_b, b_of_stripe + ((tile * 16 + lane % 16) * kRanks + n) * 16);
        mma<T>(tail[n], rows, of_b);
        mma<T>(db[tile][n], columns, of_low[n]);
      }
    }
    float* to = tails + (warp * kGroup + step % kGroup) * kStep * kRank;
#pragma unroll
    for (int n = 0; n < kRanks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(g + i / 2 * 8) * kRank + n * 8 + 2 * t + i % 2] = tail[n][i];
    }
    if (step % kGroup != kGroup - 1) continue;
    __syncthreads();
    const int row0 = begin + (step - kGroup + 1) * kStep;
    for (int i = threadIdx.x; i < kGroup * kStep * kRank; i += kThreads) {
      if (row0 + i / kRank >= end) break;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += tails[w * kGroup * kStep * kRank + i];
      op.partial_tail[(int64_t{blockIdx.x} * op.rows + row0) * kRank + i] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = tile * 16 + g + 8 * half;
      if (column >= left) continue;
      float* to = op.partial_db + (int64_t{blockIdx.y} * op.columns + column0 + column) * kRank + 2 * t;
#pragma unroll
      for (int n = 0; n < kRanks; ++n)
        *reinterpret_cast<float2*>(to + n * 8) = make_float2(db[tile][n][2 * half], db[tile][n][2 * half + 1]);
    }
  }
}

// A thread does one number of dlow and the tail, or one of a gradient of B. `tails`: how many there are of the former.
template <typename T>
__global__ void put_together(const PairGradients op, int rank, int splits, int64_t tails, int64_t all) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= all) return;
  float sum = 0;
  if (i < tails) {
    const int64_t row = i / (op.count * rank);
    const int own = static_cast<int>(i % (op.count * rank)), index = own / rank, place = own % rank;
    int slice = 0;
    for (int p = 0; p < index; ++p) slice += slices_of(op.parts[p]);
    for (int s = 0; s < slices_of(op.parts[index]); ++s)
      sum += op.partial_tail[((slice + s) * op.rows + row) * rank + place];
    const T value = from_float<T>(sum);
    if (op.tail != nullptr) static_cast<T*>(op.tail)[row * op.dy_pitch + op.parts[index].rank_begin + place] = value;
    static_cast<T*>(op.dlow)[row * op.ranks + op.parts[index].rank_begin + place] = value;
    return;
  }
  const int64_t of_all = i - tails;
  int64_t column = of_all / rank;
  const int place = static_cast<int>(of_all % rank);
  int index = 0;
  while (column >= op.parts[index].columns) column -= op.parts[index++].columns;
  const PairGradient& part = op.parts[index];
  for (int split = 0; split < splits; ++split)
    sum += op.partial_db[(split * op.columns + part.column + column) * rank + place];
  T* gradient = static_cast<T*>(part.gradient) + column * rank + place;
  *gradient = from_float<T>(fmaf(part.scaling, sum, to_float(*gradient)));
}

struct Plan {
  int slices = 0, splits = 0, split = 0;
  int64_t db_columns = 0;
};

// One wave of blocks, one a multiprocessor.
Plan plan_of(const PairGradients& op, int processors) {
  Plan plan;
  for (int i = 0; i < op.count; ++i) {
    plan.slices += slices_of(op.parts[i]);
    plan.db_columns += op.parts[i].columns;
  }
  const int unit = kGroup * kStep, wanted = processors / plan.slices > 0 ? processors / plan.slices : 1;
  const int64_t rows = (op.rows + wanted - 1) / wanted;
  plan.split = static_cast<int>((rows + unit - 1) / unit) * unit;
  plan.splits = static_cast<int>((op.rows + plan.split - 1) / plan.split);
  return plan;
}

struct Device {
  int processors = 0, shared = 0;
};
Device device_of() {
  int device = 0;
  Device out;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&out.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&out.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return out;
}

int rank_tiles(const PairGradients& op) {
  for (int i = 1; i < op.count; ++i) {
    if (op.parts[i].rank != op.parts[0].rank) return 0;
  }
  return op.parts[0].rank == 8 ? 1 : op.parts[0].rank == 16 ? 2 : 0;
}

}  // namespace

Status pair_gradients_scratch(const PairGradients& op, int64_t* numbers) {
  *numbers = 0;
  const int tiles = rank_tiles(op);
  if (tiles == 0 || op.rows == 0 || op.rows > int64_t{1} << 30 || !aligned(op.dy) || !aligned(op.low) ||
      !aligned(op.scaled_b) || op.dy_pitch % kVector != 0 || op.b_pitch % kVector != 0 || op.ranks % kVector != 0)
    return nullptr;
  for (int i = 0; i < op.count; ++i) {
    const PairGradient& part = op.parts[i];
    if (part.column % kVector != 0 || part.columns % kVector != 0 || part.rank_begin % kVector != 0) return nullptr;
  }
  const Device device = device_of();
  if (shared_bytes(tiles, 2) > device.shared) return status();
  const Plan plan = plan_of(op, device.processors);
  *numbers = (plan.slices * op.rows + int64_t{plan.splits} * op.columns) * rank_of(tiles);
  return status();
}

Status pair_gradients(const PairGradients& op, void* stream) {
  const int tiles = rank_tiles(op), rank = rank_of(tiles);
  const Device device = device_of();
  const Plan plan = plan_of(op, device.processors);
  PairGradients own = op;
  own.partial_db = op.partial_tail + int64_t{plan.slices} * op.rows * rank;
  const auto to = static_cast<cudaStream_t>(stream);
  with_type(op.type, [&]<typename T>(T) {
    const auto run = [&]<int kRanks, int kStages>(std::integral_constant<int, kRanks>,
                                                  std::integral_constant<int, kStages>) {
      constexpr int kBytes = shared_bytes(kRanks, kStages);
      cudaFuncSetAttribute(partial_sums<T, kRanks, kStages>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      partial_sums<T, kRanks, kStages><<<dim3(plan.slices, plan.splits), kThreads, kBytes, to>>>(own, plan.split);
    };
    const auto with_stages = [&](auto ranks) {
      if (shared_bytes(ranks.value, 4) <= device.shared) {
        run(ranks, std::integral_constant<int, 4>{});
      } else {
        run(ranks, std::integral_constant<int, 2>{});
      }
    };
    if (tiles == 1) {
      with_stages(std::integral_constant<int, 1>{});
    } else {
      with_stages(std::integral_constant<int, 2>{});
    }
    const int64_t tails = op.rows * op.count * rank, all = tails + plan.db_columns * rank;
    put_together<T><<<blocks_for(all, kThreads), kThreads, 0, to>>>(own, rank, plan.splits, tails, all);
  });
  return status();
}

}  // namespace martlet::cuda
