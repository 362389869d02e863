// Products of several rows with one reading of the weights, by tensor cores: weights become 16-bit numbers in
// registers, as dequantize.cu makes them (int8's scale follows later, on the sums).
//
// A tile of the result is kRows rows of weights (half of gate and the same half of up) times all rows of x. Weights as
// they are stored come through stages of shared memory, kRowBytes of each row at a time, with the columns of x that
// they meet. Tiles times stages is the work, in one row, that is shared out evenly to as many blocks as the GPU holds
// at once: where a tile's stages fall to several blocks, each leaves its sums, and the last of them to arrive adds all,
// in the order of the blocks, so that the same bits come out every time.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"
#include "cuda/mma.cuh"

namespace martlet::cuda {
namespace {

constexpr int kTile = 16;  // rows of weights that an mma takes
constexpr int kPairs = 4;  // a lane's 8 neighbouring columns of a row
constexpr int kEight = 2 * kPairs;
constexpr int kRows = kProductRows;
constexpr int kRowBytes = 128, kPieces = kRowBytes / 16;  // of a row in a stage; a lane has a piece of each of its rows
constexpr int kRowWarps = 4, kColumnWarps = kWarps / kRowWarps;
constexpr int kTiles = kRows / kTile / kRowWarps;  // of a warp
static_assert(kColumnWarps * 4 == kPieces && kTiles > 0 && kThreads % kPieces == 0);
// Stages that a block has at least, so that small products are not split into many sums.
constexpr int kLeastStages = 4;
constexpr int kBlock = 64;  // NF4: columns that share a scale
// What every block may have on all GPUs (sm_86: 99 KB), but for static variables.
constexpr int kSharedBytes = 99 * 1024 - 256;
// Blocks of a multiprocessor, if its shared memory has room for them.
constexpr int kResident = 2;

// Two neighbouring columns in 16 bits, the first in the lower half.
template <typename T>
__device__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

// 8 columns of the lane's two rows of a tile times those of its row of x (N of them).
template <typename T, int N>
__device__ void multiply(const uint32_t (&w)[2][kPairs], const uint4 (&x)[N], float (&acc)[N][4]) {
#pragma unroll
  for (int s = 0; s < kPairs / 2; ++s) {
    const uint32_t a[] = {w[0][2 * s], w[1][2 * s], w[0][2 * s + 1], w[1][2 * s + 1]};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t b[] = {s == 0 ? x[n].x : x[n].z, s == 0 ? x[n].y : x[n].w};
      mma<T>(acc[n], a, b);
    }
  }
}

// Copies `bytes` of 16, the rest becomes 0.
__device__ void copy(void* to, const void* from, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(bytes)
      : "memory");
}

// The thread's copies since the last call are one group; groups end in their order.
__device__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the thread's last `Left` groups have arrived.
template <int Left>
__device__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

struct Product {
  Parts parts;
  bool gated;
  Activation activation;
  int batch, columns, out_rows;
  int tiles, chunks;  // of the result; of the columns
  const void *x, *residual;
  void* out;
  // Sums of tiles that several blocks have, two places for each block; and for each block how many have left theirs of
  // the tile that is its last: 0 before and after.
  float* sums;
  int32_t* arrived;
};

// Tiles of R rows that a matrix takes.
template <int R>
__host__ __device__ int tiles_of(const Matrix& m) {
  return (m.rows + R - 1) / R;
}

// R rows of weights: R / 2 of `first`, then R / 2 of `second`, which is another matrix if the product is gated. Rows
// beyond the end are the last row.
template <int R>
struct Tile {
  const Matrix *first, *second;
  int first_row, second_row;
  int rows_before;  // of the parts before

  __device__ Tile(const Product& op, int index) : rows_before(0) {
    if (op.gated) {
      first = &op.parts.matrix[0];
      second = &op.parts.matrix[1];
      first_row = second_row = index * (R / 2);
      return;
    }
    int part = 0;
    while (index >= tiles_of<R>(op.parts.matrix[part])) {
      index -= tiles_of<R>(op.parts.matrix[part]);
      rows_before += op.parts.matrix[part++].rows;
    }
    first = second = &op.parts.matrix[part];
    first_row = index * R;
    second_row = first_row + R / 2;
  }
  __device__ const Matrix& matrix(int place) const { return place < R / 2 ? *first : *second; }
  __device__ int row(int place) const {
    const int row = place < R / 2 ? first_row + place : second_row + place - R / 2;
    return min(row, matrix(place).rows - 1);
  }
};

// A tile's sums in shared memory, [8 N rows of x][R rows of weights]; a row's length keeps the lanes that write d of an
// mma in banks of their own.
template <int R>
constexpr int kSumPitch = R + 4;

// Warps that have the same rows add their sums one after the other. `place` is the warp's first row in the tile.
template <int R, int Tiles, int N>
__device__ void add_up(const float (&acc)[Tiles][N][4], int place, int turn, int turns, float* sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int now = 0; now < turns; ++now) {
    if (turn == now) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& to = sums[(8 * n + 2 * t + i % 2) * kSumPitch<R> + place + kTile * tile + g + 8 * (i / 2)];
            to = now == 0 ? acc[tile][n][i] : to + acc[tile][n][i];
          }
        }
      }
    }
    __syncthreads();
  }
}

// int8: the sums of codes get their rows' scales; `with_outliers`: and the columns that are kept in 16 bits are added,
// 16 at a time by the warps that have the same rows in turn.
template <typename T, int R, int Tiles, int N>
__device__ void finish_codes(const Product& op, const Tile<R>& rows, int place, int turn, int turns, bool with_outliers,
                             float (&acc)[Tiles][N][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
    const int top = place + kTile * tile + g;
    const Matrix& m = rows.matrix(top);
    if (m.storage != Storage::kInt8) continue;
    const int row[] = {rows.row(top), rows.row(top + 8)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = static_cast<const float*>(m.scales)[row[half]] * static_cast<float>(1.0 / 127.0);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        acc[tile][n][2 * half] *= scale;
        acc[tile][n][2 * half + 1] *= scale;
      }
    }
    if (!with_outliers) continue;
    const auto *kept = static_cast<const uint16_t*>(m.outlier_values), *x = static_cast<const uint16_t*>(op.x);
    for (int begin = turn * kTile; begin < m.outliers; begin += turns * kTile) {
      // Bits of outliers i and i + 1 as `bits` gives them, 0 beyond the last.
      const auto pair = [&](int i, auto&& bits) {
        const uint32_t low = i < m.outliers ? bits(i) : 0, high = i + 1 < m.outliers ? bits(i + 1) : 0;
        return low | high << 16;
      };
      uint32_t a[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        a[k] = pair(begin + 2 * t + k / 2 * 8,
                    [&](int i) -> uint32_t { return kept[int64_t{row[k % 2]} * m.outliers + i]; });
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint16_t* in = x + int64_t{min(8 * n + g, op.batch - 1)} * op.columns;
        uint32_t b[2];
#pragma unroll
        for (int k = 0; k < 2; ++k)
          b[k] = pair(begin + 2 * t + 8 * k, [&](int i) -> uint32_t { return in[m.outlier_columns[i]]; });
        mma<T>(acc[tile][n], a, b);
      }
    }
  }
}

// B's row · (A x) for Count rows of x: `of`, of + step, …
template <typename T, typename L, int Count>
__device__ void low_rank(const Lora& lora, int row, int of, int step, int batch, float (&sum)[Count]) {
  const L* b = static_cast<const L*>(lora.b) + int64_t{row} * lora.rank;
  const float* low[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    low[k] = lora.low + int64_t{min(of + k * step, batch - 1)} * lora.rank;
    sum[k] = 0;
  }
  for (int i = 0; i < lora.rank; ++i) {
    const float value = to_float(b[i]);
#pragma unroll
    for (int k = 0; k < Count; ++k)
      sum[k] = fmaf(value, std::is_same_v<L, float> ? low[k][i] : rounded<T>(low[k][i]), sum[k]);
  }
}

// Bias and adapter as the linear rounds them, for the same rows of x.
template <typename T, int Count>
__device__ void finish_linear(const Matrix& m, int row, int of, int step, int batch, float (&sum)[Count]) {
  const float bias = m.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(m.bias)[row]);
#pragma unroll
  for (int k = 0; k < Count; ++k) sum[k] = rounded<T>(m.bias == nullptr ? sum[k] : sum[k] + bias);
  if (m.lora.a == nullptr) return;
  float added[Count];
  if (m.lora.is_float) {
    low_rank<T, float>(m.lora, row, of, step, batch, added);
  } else {
    low_rank<T, T>(m.lora, row, of, step, batch, added);
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) sum[k] = rounded<T>(fmaf(m.lora.scaling, added[k], sum[k]));
}

// From a tile's sums to the result: a thread has a row of weights (and its partner of `up`), for some rows of x.
template <typename T, int R, int N>
__device__ void finish(const Product& op, const Tile<R>& tile, float* sums) {
  constexpr int kCount = 8 * N * R / kThreads;
  const int width = op.gated ? R / 2 : R, step = kThreads / width;
  const int place = threadIdx.x % width, of = threadIdx.x / width, row = tile.first_row + place;
  if (row >= tile.first->rows) return;
  // Of row of x number k; rows beyond the batch are there, but mean nothing.
  const auto sum = [&](int k, int at) -> float& { return sums[min(of + k * step, 8 * N - 1) * kSumPitch<R> + at]; };
  const auto linear = [&](const Matrix& m, int at, float (&y)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) y[k] = sum(k, at);
    finish_linear<T>(m, row, of, step, op.batch, y);
  };
  float y[kCount];
  linear(*tile.first, place, y);
  if (op.activation != Activation::kNone) {
    // By way of shared memory, so that the code of the activations is there once, not kCount times.
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (of + k * step < op.batch) sum(k, place) = y[k];
    }
#pragma unroll 1
    for (int k = 0; of + k * step < op.batch; ++k) sum(k, place) = activate(sum(k, place), op.activation);
#pragma unroll
    for (int k = 0; k < kCount; ++k) y[k] = sum(k, place);
  }
  if (op.gated) {
    float up[kCount];
    linear(*tile.second, R / 2 + place, up);
#pragma unroll
    for (int k = 0; k < kCount; ++k) y[k] = rounded<T>(y[k]) * up[k];
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (of + k * step >= op.batch) break;
    const int64_t to = int64_t{of + k * step} * op.out_rows + tile.rows_before + row;
    if (!op.gated && op.residual != nullptr) y[k] += to_float(static_cast<const T*>(op.residual)[to]);
    static_cast<T*>(op.out)[to] = from_float<T>(y[k]);
  }
}

// A stage in shared memory: kRowBytes of each row of weights, whose 16-byte pieces lie so that 8 lanes that read 4
// pieces of two rows are in banks of their own; x; NF4: the blocks' scales. x lies as the lanes read it: [warps along
// the columns][8 columns of those of a piece][N][lane].
template <Storage S, int N>
struct Stage {
  static constexpr int kBits = S == Storage::kDense ? 16 : S == Storage::kInt8 ? 8 : 4;
  static constexpr int kColumns = kRowBytes * 8 / kBits;
  static constexpr int kEights = kColumns / kPieces / kEight;  // of a piece
  static constexpr int kBlocks = S == Storage::kNf4 ? kColumns / kBlock : 0;
  static constexpr int kX = kRows * kRowBytes, kScales = kX + 8 * N * kColumns * 2,
                       kBytes = kScales + kRows * kBlocks * 4;
  static constexpr int kSumBytes = 8 * N * kSumPitch<kRows> * 4;
  static constexpr int kCount = (kSharedBytes - kSumBytes) / kBytes, kAllBytes = kCount * kBytes + kSumBytes;
  static_assert(kCount > 2);

  __device__ static int weights_at(int row, int piece) {
    return row * kRowBytes + (piece ^ (row % 2 * (kPieces / 2))) * 16;
  }
  __device__ static int x_at(int column_warp, int eight, int n, int lane) {
    return kX + (((column_warp * kEights + eight) * N + n) * 32 + lane) * 16;
  }
  __device__ static int scale_at(int row, int block) { return kScales + (row * kBlocks + block) * 4; }
};

// The scales of a stage's blocks that a thread brings: asked for, and later put into their places.
template <Storage S, int N>
struct Scales {
  __device__ void fetch(const Tile<kRows>&, int) {}
  __device__ void settle(char*) const {}
};

template <int N>
struct Scales<Storage::kNf4, N> {
  using Of = Stage<Storage::kNf4, N>;
  static constexpr int kEach = kRows * Of::kBlocks / kThreads;
  static_assert(kEach > 0 && Of::kBlocks % kEach == 0);
  const Matrix* matrix;
  float scale[kEach];  // nested: one of each 256 scales
  uint8_t code[kEach];

  __device__ static int row() { return threadIdx.x * kEach / Of::kBlocks; }
  __device__ static int block() { return threadIdx.x * kEach % Of::kBlocks; }
  // Blocks beyond a row's end meet zeros of x: any scale of the row will do.
  __device__ void fetch(const Tile<kRows>& tile, int chunk) {
    matrix = &tile.matrix(row());
    const int blocks = matrix->columns / kBlock;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = int64_t{tile.row(row())} * blocks + min(chunk * Of::kBlocks + block() + i, blocks - 1);
      if (matrix->nested_map == nullptr) {
        scale[i] = static_cast<const float*>(matrix->scales)[at];
      } else {
        code[i] = static_cast<const uint8_t*>(matrix->scales)[at];
        scale[i] = __ldg(matrix->nested_scales + at / 256);
      }
    }
  }
  __device__ void settle(char* stage) const {
    float all[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      all[i] = matrix->nested_map == nullptr ? scale[i] : nf4_scale(*matrix, code[i], scale[i]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) *reinterpret_cast<float*>(stage + Of::scale_at(row(), block() + i)) = all[i];
  }
};

// A thread's part of bringing the stages of a block, one after the other: a piece of every (kThreads / kPieces)th row
// of weights, some pieces of x. Columns beyond the end, and rows of x beyond the batch, are 0.
template <Storage S, int N>
class Loader {
 public:
  __device__ Loader(const Product& op, int tile, int chunk) : op_(op), tile_(op, tile), index_(tile), chunk_(chunk) {
    point();
  }
  __device__ void weights(char* stage) const {
    const int at = chunk_ * kRowBytes + piece() * 16;
    const bool there = at < op_.columns * Of::kBits / 8;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      copy(stage + Of::weights_at(row(i), piece()), there ? rows_[i] + at : rows_[i], there ? 16 : 0);
  }
  __device__ void scales(Scales<S, N>& to) const { to.fetch(tile_, chunk_); }
  __device__ void x(char* stage) const {
    each_of_x(op_, chunk_, [&](int, int place, const void* from) {
      copy(stage + place, from == nullptr ? op_.x : from, from == nullptr ? 0 : 16);
    });
  }
  // The same for the first `count` stages, of `Most`, at once and without a group: they are there after the next
  // barrier.
  template <int Most>
  __device__ static void first_x(const Product& op, int chunk, int count, char* stages) {
    uint4 held[Most][kEachOfX];
#pragma unroll
    for (int s = 0; s < Most; ++s) {
      if (s >= count) break;
      each_of_x(op, (chunk + s) % op.chunks, [&](int i, int, const void* from) {
        held[s][i] = from == nullptr ? make_uint4(0, 0, 0, 0) : *static_cast<const uint4*>(from);
      });
    }
#pragma unroll
    for (int s = 0; s < Most; ++s) {
      if (s >= count) break;
      each_of_x(op, 0, [&](int i, int place, const void*) {
        *reinterpret_cast<uint4*>(stages + s * Of::kBytes + place) = held[s][i];
      });
    }
  }
  // To the next stage, which there is.
  __device__ void advance() {
    if (++chunk_ < op_.chunks) return;
    chunk_ = 0;
    tile_ = Tile<kRows>(op_, ++index_);
    point();
  }

 private:
  using Of = Stage<S, N>;
  static constexpr int kEach = kRows * kPieces / kThreads;
  static constexpr int kOfRow = Of::kColumns / kEight, kOfX = 8 * N * kOfRow,
                       kEachOfX = (kOfX + kThreads - 1) / kThreads;

  __device__ static int piece() { return threadIdx.x % kPieces; }
  __device__ static int row(int i) { return threadIdx.x / kPieces + i * (kThreads / kPieces); }
  __device__ void point() {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      rows_[i] = static_cast<const char*>(tile_.matrix(row(i)).weight) +
                 int64_t{tile_.row(row(i))} * (op_.columns * Of::kBits / 8);
    }
  }
  // fn(i, place in the stage, where the 8 numbers are or null) for the thread's pieces of x.
  template <typename Fn>
  __device__ static void each_of_x(const Product& op, int chunk, const Fn& fn) {
#pragma unroll
    for (int i = 0; i < kEachOfX; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / kOfRow, eight = at % kOfRow;
      if (at >= kOfX) break;
      const int column = chunk * Of::kColumns + eight * kEight, piece = eight / Of::kEights;
      const bool there = row < op.batch && column < op.columns;
      fn(i, Of::x_at(piece / 4, eight % Of::kEights, row / 8, row % 8 * 4 + piece % 4),
         there ? static_cast<const uint16_t*>(op.x) + int64_t{row} * op.columns + column : nullptr);
    }
  }

  const Product& op_;
  Tile<kRows> tile_;
  int index_, chunk_;
  const char* rows_[kEach];
};

// Eight `which` of a piece of weights as 16-bit numbers.
template <typename T, Storage S>
__device__ void numbers(const uint4& piece, int which, float scale, const float* table, uint32_t (&out)[kPairs]) {
  const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
  if constexpr (S == Storage::kDense) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) out[j] = words[j];
  } else if constexpr (S == Storage::kInt8) {
    // 2²³ + (code + 128) is a float whose last byte is code + 128.
    const auto number = [](uint32_t shifted, int j) {
      return __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7440 + j)) - 8388736.0f;
    };
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t shifted = words[2 * which + w] ^ 0x80808080u;
      out[2 * w] = pack<T>(number(shifted, 0), number(shifted, 1));
      out[2 * w + 1] = pack<T>(number(shifted, 2), number(shifted, 3));
    }
  } else {
    // The four upper and the four lower halves, times 4: places in the table in bytes.
    const uint32_t upper = words[which] >> 2 & 0x3c3c3c3cu, lower = words[which] << 2 & 0x3c3c3c3cu;
    const auto number = [&](uint32_t places, int j) {
      return scale *
             *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + __byte_perm(places, 0, 0x4440 + j));
    };
#pragma unroll
    for (int j = 0; j < kPairs; ++j) out[j] = pack<T>(number(upper, j), number(lower, j));
  }
}

template <typename T, Storage S, int N>
__device__ void multiply_stage(const char* stage, const float* table, float (&acc)[kTiles][N][4]) {
  using Of = Stage<S, N>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column_warp = warp / kRowWarps;
  const int top = warp % kRowWarps * kTiles * kTile + lane / 4, piece = column_warp * 4 + lane % 4;
  uint4 pieces[kTiles][2];
  float scales[kTiles][2] = {};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = top + kTile * tile + 8 * half;
      pieces[tile][half] = *reinterpret_cast<const uint4*>(stage + Of::weights_at(row, piece));
      if constexpr (S == Storage::kNf4) {
        scales[tile][half] =
            *reinterpret_cast<const float*>(stage + Of::scale_at(row, piece / (kPieces / Of::kBlocks)));
      }
    }
  }
#pragma unroll
  for (int eight = 0; eight < Of::kEights; ++eight) {
    uint4 x[N];
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = *reinterpret_cast<const uint4*>(stage + Of::x_at(column_warp, eight, n, lane));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t w[2][kPairs];
#pragma unroll
      for (int half = 0; half < 2; ++half) numbers<T, S>(pieces[tile][half], eight, scales[tile][half], table, w[half]);
      multiply<T, N>(w, x, acc[tile]);
    }
  }
}

// Where a block begins in all stages, and which block has one of them. (32 bits are enough: up to 11 million stages,
// which are 170 GiB of weights in one product.)
__device__ uint32_t first_of(uint32_t block, uint32_t all) { return block * all / gridDim.x; }
__device__ int block_of(uint32_t stage, uint32_t all) { return static_cast<int>(((stage + 1) * gridDim.x - 1) / all); }

// How many were here before. What a block has written before (and met for) is seen by blocks that arrive later.
__device__ int arrive(int32_t* count) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}

// This block's sums of a tile that blocks `first` to `last` have parts of go to the others. True: it was the last, and
// has the sums of all now.
template <int N>
__device__ bool meet(const Product& op, int first, int last, bool* is_last, float* sums) {
  constexpr int kQuads = kRows / 4;
  const int count = op.batch * kQuads;
  // Of a tile's blocks only the first begins elsewhere: it is the block's last tile.
  const auto left_by = [&](int block) {
    return reinterpret_cast<float4*>(op.sums) + int64_t{2 * block + (block == first ? 1 : 0)} * count;
  };
  const auto own = [&](int i) -> float4& {
    return *reinterpret_cast<float4*>(sums + i / kQuads * kSumPitch<kRows> + i % kQuads * 4);
  };
  float4* to = left_by(blockIdx.x);
  for (int i = threadIdx.x; i < count; i += kThreads) __stcg(to + i, own(i));
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = arrive(op.arrived + first) == last - first;
    if (*is_last) op.arrived[first] = 0;
  }
  __syncthreads();
  if (!*is_last) return false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float4 sum = __ldcg(left_by(first) + i);
#pragma unroll 8
    for (int block = first + 1; block <= last; ++block) {
      const float4 part = __ldcg(left_by(block) + i);
      sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
    }
    own(i) = sum;
  }
  __syncthreads();
  return true;
}

// N: groups of 8 rows of x.
template <typename T, Storage S, int N>
__global__ void __launch_bounds__(kThreads, kResident) products(const __grid_constant__ Product op) {
  using Of = Stage<S, N>;
  extern __shared__ uint4 shared[];
  __shared__ float table[16];
  __shared__ bool is_last;
  char* const stages = reinterpret_cast<char*>(shared);
  float* const sums = reinterpret_cast<float*>(stages + Of::kCount * Of::kBytes);
  const uint32_t all = op.tiles * op.chunks;
  const auto begin = static_cast<int>(first_of(blockIdx.x, all)), end = static_cast<int>(first_of(blockIdx.x + 1, all));
  let_next_start();
  if constexpr (S == Storage::kNf4) {
    if (threadIdx.x < 16) table[threadIdx.x] = codes_on_device.values[threadIdx.x];
  }
  // Stage s is group s, until the last stage; then groups are empty. Weights are not what the kernel before makes.
  constexpr int kAhead = Of::kCount - 1, kUnroll = S == Storage::kNf4 ? kAhead : 1;
  int tile = begin / op.chunks, chunk = begin % op.chunks;
  Loader<S, N> loader(op, tile, chunk);
  {
    Scales<S, N> scales[kAhead];
#pragma unroll kUnroll
    for (int s = 0; s < kAhead; ++s) {
      if (begin + s < end) {
        if (s > 0) loader.advance();
        loader.weights(stages + s * Of::kBytes);
        loader.scales(scales[s]);
      }
      end_group();
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (begin + s < end) scales[s].settle(stages + s * Of::kBytes);
    }
  }
  wait_for_earlier();
  Loader<S, N>::template first_x<kAhead>(op, chunk, end - begin, stages);

  const int warp = threadIdx.x / 32, place = warp % kRowWarps * kTiles * kTile;
  float acc[kTiles][N][4] = {};
  int now = 0;  // the stage's place
  bool from_start = chunk == 0;
  for (int stage = begin; stage < end; ++stage) {
    wait_for_groups<kAhead - 1>();
    // All have their parts of this stage, and are done with the one before, whose place is the next to be filled.
    __syncthreads();
    Scales<S, N> scales;
    char* const coming = stages + (now == 0 ? kAhead : now - 1) * Of::kBytes;
    const bool more = stage + kAhead < end;
    if (more) {
      loader.advance();
      loader.weights(coming);
      loader.x(coming);
      loader.scales(scales);
    }
    end_group();
    multiply_stage<T, S, N>(stages + now * Of::kBytes, table, acc);
    if (more) scales.settle(coming);
    now = now == kAhead ? 0 : now + 1;
    if (++chunk < op.chunks && stage + 1 < end) continue;

    const Tile<kRows> rows(op, tile);
    if constexpr (S == Storage::kInt8)
      finish_codes<T, kRows>(op, rows, place, warp / kRowWarps, kColumnWarps, from_start, acc);
    add_up<kRows>(acc, place, warp / kRowWarps, kColumnWarps, sums);
    const uint32_t first_stage = tile * op.chunks;
    if ((from_start && chunk == op.chunks) ||
        meet<N>(op, block_of(first_stage, all), block_of(first_stage + op.chunks - 1, all), &is_last, sums))
      finish<T, kRows, N>(op, rows, sums);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][n][j] = 0;
      }
    }
    ++tile;
    chunk = 0;
    from_start = true;
  }
}

// Of any shape: one by one; beyond the end there are zeros.
template <typename T>
__device__ void any_numbers(const Matrix& m, int row, int column, const float* table, uint32_t (&out)[kPairs]) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    float both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = column + 2 * j + i;
      const int64_t place = int64_t{row} * m.columns + at;
      if (at >= m.columns) {
        both[i] = 0;
      } else if (m.storage == Storage::kDense) {
        both[i] = to_float(static_cast<const T*>(m.weight)[place]);
      } else if (m.storage == Storage::kInt8) {
        both[i] = static_cast<const int8_t*>(m.weight)[place];
      } else {
        const uint32_t byte = static_cast<const uint8_t*>(m.weight)[place / 2];
        both[i] = table[place % 2 == 0 ? byte >> 4 : byte & 15] * nf4_scale(m, place / kBlock);
      }
    }
    out[j] = pack<T>(both[0], both[1]);
  }
}

// Weights and x of any shape, or of storages that differ: a block does two mmas' rows, its warps taking turns along the
// columns.
constexpr int kAnyRows = 2 * kTile;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResident) any_products(const __grid_constant__ Product op) {
  __shared__ float table[16];
  __shared__ float sums[8 * N * kSumPitch<kAnyRows>];
  if (threadIdx.x < 16) table[threadIdx.x] = codes_on_device.values[threadIdx.x];
  __syncthreads();
  const Tile<kAnyRows> rows(op, blockIdx.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const T* x = static_cast<const T*>(op.x);
  float acc[2][N][4] = {};
  for (int begin = warp * 4 * kEight; begin < op.columns; begin += kThreads / 8 * kEight) {
    const int own = begin + lane % 4 * kEight;
    uint4 in[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T* row = x + int64_t{min(8 * n + g, op.batch - 1)} * op.columns;
      const auto pair = [&](int column) {
        const auto at = [&](int i) { return i < op.columns ? to_float(row[i]) : 0.0f; };
        return pack<T>(at(own + column), at(own + column + 1));
      };
      in[n] = {pair(0), pair(2), pair(4), pair(6)};
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t w[2][kPairs];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = kTile * tile + g + 8 * half;
        any_numbers<T>(rows.matrix(place), rows.row(place), own, table, w[half]);
      }
      multiply<T, N>(w, in, acc[tile]);
    }
  }
  finish_codes<T, kAnyRows>(op, rows, 0, warp, kWarps, true, acc);
  add_up<kAnyRows>(acc, 0, warp, kWarps, sums);
  finish<T, kAnyRows, N>(op, rows, sums);
}

// Rows are read 16 bytes at a time.
bool takes_pieces(const Matrix& m) {
  return m.columns % (m.storage == Storage::kNf4 ? kBlock : kTile) == 0 &&
         reinterpret_cast<uintptr_t>(m.weight) % 16 == 0;
}

template <int R>
int tiles_of(const Matvec& op) {
  if (op.gated) return (op.parts[0].rows + R / 2 - 1) / (R / 2);
  int tiles = 0;
  for (int i = 0; i < op.count; ++i) tiles += tiles_of<R>(op.parts[i]);
  return tiles;
}

// As many blocks as the GPU holds at once, ahead: weights are brought while the kernel before still runs, which may not
// be one that writes them.
template <typename Of>
Status start(void (*kernel)(const Product), const Product& op, cudaStream_t stream) {
  int device = 0, processors = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::kAllBytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  // A block takes up to 2 KB more, for static variables and for the system.
  const int most = std::min(processors * std::clamp(shared / (Of::kAllBytes + 2048), 1, kResident), kProductBlocks);
  const int64_t stages = int64_t{op.tiles} * op.chunks;
  const auto blocks = static_cast<unsigned int>(std::min<int64_t>((stages + kLeastStages - 1) / kLeastStages, most));
  launch(kernel, blocks, kThreads, Of::kAllBytes, stream, op);
  return status();
}

template <typename T, int N>
Status enqueue(const Matvec& op, Product product, cudaStream_t stream) {
  const Storage storage = op.parts[0].storage;
  bool pieces = aligned(op.x);
  for (int i = 0; i < op.count; ++i) pieces = pieces && op.parts[i].storage == storage && takes_pieces(op.parts[i]);
  if (!pieces) {
    any_products<T, N><<<tiles_of<kAnyRows>(op), kThreads, 0, stream>>>(product);
    return status();
  }
  product.tiles = tiles_of<kRows>(op);
  const auto of = [&]<Storage S>(std::integral_constant<Storage, S>) {
    using Of = Stage<S, N>;
    product.chunks = (product.columns + Of::kColumns - 1) / Of::kColumns;
    return start<Of>(products<T, S, N>, product, stream);
  };
  switch (storage) {
    case Storage::kDense:
      return of(std::integral_constant<Storage, Storage::kDense>{});
    case Storage::kInt8:
      return of(std::integral_constant<Storage, Storage::kInt8>{});
    case Storage::kNf4:
      return of(std::integral_constant<Storage, Storage::kNf4>{});
  }
  return "weights that no product takes";
}

}  // namespace

Status enqueue_products(const Matvec& op, Type type, void* stream) {
  if (op.batch > kMaxBatch) return "more rows than a product takes at once";
  Product product = {.gated = op.gated,
                     .activation = op.activation,
                     .batch = op.batch,
                     .columns = op.parts[0].columns,
                     .x = op.x,
                     .residual = op.residual,
                     .out = op.out,
                     .sums = op.sums,
                     .arrived = op.arrived};
  for (int i = 0; i < op.count; ++i) {
    product.parts.matrix[i] = op.parts[i];
    if (i == 0 || !op.gated) product.out_rows += op.parts[i].rows;
  }
  Status error = nullptr;
  with_type(type, [&]<typename T>(T) {
    const auto to = static_cast<cudaStream_t>(stream);
    error = op.batch > 8 ? enqueue<T, 2>(op, product, to) : enqueue<T, 1>(op, product, to);
  });
  return error;
}

}  // namespace martlet::cuda
