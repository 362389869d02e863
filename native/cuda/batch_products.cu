// Products of several rows with one reading of the weights, by tensor cores: weights become 16-bit numbers in
// registers, as dequantize.cu makes them (int8's scale follows later, on the sums). A block does 32 rows of weights (16
// of gate and the same 16 of up), its warps taking turns along the columns; their sums meet in shared memory.
#include "cuda/matrix.cuh"

namespace martlet::cuda {
namespace {

constexpr int kTile = 16;   // rows of weights that an mma takes
constexpr int kChunk = 64;  // columns that a warp does at once; a lane's 16 are beside each other
constexpr int kPerThread = 16;
constexpr int kPairs = kPerThread / 2;

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

// d += a · b: 16 rows of weights, 16 columns, 8 rows of x. a: rows g and g + 8 of columns (2t, 2t + 1), then of
// (2t + 8, 2t + 9); b: the same columns of row g; d: rows g and g + 8 for rows 2t and 2t + 1 of x. (g = lane / 4,
// t = lane % 4. Which columns of the matrix these are is the same for a and b, and so does not matter.)
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

// A lane's 16 columns of a row: as they are stored, and as kPairs pairs of numbers.
template <typename T, Storage S>
struct Raw;

template <typename T>
struct Raw<T, Storage::kDense> {
  uint4 words[2];
  __device__ void fetch(const Matrix& m, int row, int column) {
    const auto* from =
        reinterpret_cast<const uint4*>(static_cast<const T*>(m.weight) + int64_t{row} * m.columns + column);
    words[0] = __ldcs(from);
    words[1] = __ldcs(from + 1);
  }
  __device__ void numbers(const Matrix&, const float*, uint32_t* out) const {
    const uint32_t all[] = {words[0].x, words[0].y, words[0].z, words[0].w,
                            words[1].x, words[1].y, words[1].z, words[1].w};
#pragma unroll
    for (int j = 0; j < kPairs; ++j) out[j] = all[j];
  }
};

template <typename T>
struct Raw<T, Storage::kInt8> {
  uint4 codes;
  __device__ void fetch(const Matrix& m, int row, int column) {
    codes = __ldcs(
        reinterpret_cast<const uint4*>(static_cast<const int8_t*>(m.weight) + int64_t{row} * m.columns + column));
  }
  __device__ void numbers(const Matrix&, const float*, uint32_t* out) const {
    const uint32_t all[] = {codes.x, codes.y, codes.z, codes.w};
    // 2²³ + (code + 128) is a float whose last byte is code + 128.
    const auto number = [](uint32_t shifted, int j) {
      return __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7440 + j)) - 8388736.0f;
    };
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t shifted = all[w] ^ 0x80808080u;
      out[2 * w] = pack<T>(number(shifted, 0), number(shifted, 1));
      out[2 * w + 1] = pack<T>(number(shifted, 2), number(shifted, 3));
    }
  }
};

// A chunk is a block of 64, with one scale.
template <typename T>
struct Raw<T, Storage::kNf4> {
  uint2 codes;
  float scale;  // nested: one of each 256 scales, until numbers()
  uint8_t code;
  __device__ void fetch(const Matrix& m, int row, int column) {
    const int64_t place = int64_t{row} * m.columns + column, block = place / 64;
    codes = __ldcs(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(m.weight) + place / 2));
    if (m.nested_map == nullptr) {
      scale = static_cast<const float*>(m.scales)[block];
    } else {
      code = static_cast<const uint8_t*>(m.scales)[block];
      scale = __ldg(m.nested_scales + block / 256);
    }
  }
  __device__ void numbers(const Matrix& m, const float* table, uint32_t* out) const {
    const float s = m.nested_map == nullptr ? scale : nf4_scale(m, code, scale);
    const uint32_t all[] = {codes.x, codes.y};
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t byte = all[w] >> (8 * j);
        out[4 * w + j] = pack<T>(table[byte >> 4 & 15] * s, table[byte & 15] * s);
      }
    }
  }
};

// Of any shape: one by one; beyond the end there are zeros.
template <typename T>
__device__ void any_numbers(const Matrix& m, int row, int column, const float* table, uint32_t* out) {
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
        both[i] = table[place % 2 == 0 ? byte >> 4 : byte & 15] * nf4_scale(m, place / 64);
      }
    }
    out[j] = pack<T>(both[0], both[1]);
  }
}

// Two tiles of weights and the rows of x that they meet.
struct Tiles {
  const Matrix* matrix[2];
  int row[2];  // the first
};

// acc: [tile][eight rows of x][4], as mma's d.
template <typename T, int N>
__device__ void multiply(const Tiles& tiles, const uint32_t (&w)[2][2][kPairs], const uint32_t (&x)[N][kPairs],
                         float (&acc)[2][N][4]) {
#pragma unroll
  for (int s = 0; s < kPairs / 2; ++s) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t a[] = {w[tile][0][2 * s], w[tile][1][2 * s], w[tile][0][2 * s + 1], w[tile][1][2 * s + 1]};
#pragma unroll
      for (int n = 0; n < N; ++n) mma<T>(acc[tile][n], a, &x[n][2 * s]);
    }
  }
}

template <typename T, Storage S, int N>
__device__ void by_words(const Tiles& tiles, const T* x, int batch, const float* table, float (&acc)[2][N][4]) {
  const int columns = tiles.matrix[0]->columns, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, own = lane % 4 * kPerThread;
  const int chunks = (columns + kChunk - 1) / kChunk;
  struct Step {
    Raw<T, S> weights[2][2];
    uint4 x[N][2];
    bool there;
  };
  const auto fetch = [&](int chunk, Step& step) {
    const int column = chunk * kChunk + own;
    step.there = chunk < chunks && column < columns;
    if (!step.there) return;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const Matrix& m = *tiles.matrix[tile];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        step.weights[tile][half].fetch(m, min(tiles.row[tile] + g + 8 * half, m.rows - 1), column);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const auto* from = reinterpret_cast<const uint4*>(x + int64_t{min(8 * n + g, batch - 1)} * columns + column);
      step.x[n][0] = from[0];
      step.x[n][1] = from[1];
    }
  };
  Step next;
  fetch(warp, next);
  for (int chunk = warp; chunk < chunks; chunk += kWarps) {
    const Step step = next;
    fetch(chunk + kWarps, next);
    uint32_t w[2][2][kPairs] = {}, in[N][kPairs] = {};
    if (step.there) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          step.weights[tile][half].numbers(*tiles.matrix[tile], table, w[tile][half]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint32_t all[] = {step.x[n][0].x, step.x[n][0].y, step.x[n][0].z, step.x[n][0].w,
                                step.x[n][1].x, step.x[n][1].y, step.x[n][1].z, step.x[n][1].w};
#pragma unroll
        for (int j = 0; j < kPairs; ++j) in[n][j] = all[j];
      }
    }
    multiply<T, N>(tiles, w, in, acc);
  }
}

template <typename T, int N>
__device__ void one_by_one(const Tiles& tiles, const T* x, int batch, const float* table, float (&acc)[2][N][4]) {
  const int columns = tiles.matrix[0]->columns, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, own = lane % 4 * kPerThread;
  for (int begin = warp * kChunk; begin < columns; begin += kWarps * kChunk) {
    uint32_t w[2][2][kPairs], in[N][kPairs];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const Matrix& m = *tiles.matrix[tile];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        any_numbers<T>(m, min(tiles.row[tile] + g + 8 * half, m.rows - 1), begin + own, table, w[tile][half]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T* row = x + int64_t{min(8 * n + g, batch - 1)} * columns;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const auto at = [&](int column) { return column < columns ? to_float(row[column]) : 0.0f; };
        in[n][j] = pack<T>(at(begin + own + 2 * j), at(begin + own + 2 * j + 1));
      }
    }
    multiply<T, N>(tiles, w, in, acc);
  }
}

// int8: the sums of codes get their rows' scales, and the columns that are kept in 16 bits are added.
template <typename T, int N>
__device__ void add_outliers(const Tiles& tiles, const T* x, int batch, float (&acc)[2][N][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const Matrix& m = *tiles.matrix[tile];
    if (m.storage != Storage::kInt8) continue;
    const T* kept = static_cast<const T*>(m.outlier_values);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tiles.row[tile] + g + 8 * half, m.rows - 1);
      const float scale = static_cast<const float*>(m.scales)[row] * static_cast<float>(1.0 / 127.0);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        acc[tile][n][2 * half] *= scale;
        acc[tile][n][2 * half + 1] *= scale;
      }
      for (int i = warp; i < m.outliers; i += kWarps) {
        const float value = to_float(kept[int64_t{row} * m.outliers + i]);
        const T* column = x + m.outlier_columns[i];
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float in = to_float(column[int64_t{min(8 * n + 2 * t + j, batch - 1)} * m.columns]);
            acc[tile][n][2 * half + j] = fmaf(value, in, acc[tile][n][2 * half + j]);
          }
        }
      }
    }
  }
}

template <typename T, typename L>
__device__ float low_rank(const Lora& lora, int row, int of) {
  const L* b = static_cast<const L*>(lora.b) + int64_t{row} * lora.rank;
  const float* low = lora.low + int64_t{of} * lora.rank;
  float sum = 0;
  for (int i = 0; i < lora.rank; ++i)
    sum = fmaf(to_float(b[i]), std::is_same_v<L, float> ? low[i] : rounded<T>(low[i]), sum);
  return sum;
}

// Bias and adapter as the linear rounds them, for row `of` of x.
template <typename T>
__device__ float finished(const Matrix& m, int row, int of, float sum) {
  if (m.bias != nullptr) sum += to_float(static_cast<const T*>(m.bias)[row]);
  sum = rounded<T>(sum);
  if (m.lora.a == nullptr) return sum;
  const float added = m.lora.is_float ? low_rank<T, float>(m.lora, row, of) : low_rank<T, T>(m.lora, row, of);
  return rounded<T>(fmaf(m.lora.scaling, added, sum));
}

// Blocks of two tiles that a matrix takes.
__host__ __device__ inline int blocks_of(const Matrix& m) { return (m.rows + 2 * kTile - 1) / (2 * kTile); }

// How a product's weights are read.
enum class Form { kDense, kInt8, kNf4, kOneByOne };

// N: groups of 8 rows of x. Two blocks of a multiprocessor have 128 registers for each thread: too few for 16 rows and
// weights of 16 bits, two steps of which are kept.
template <typename T, int N, Form F>
__global__ void __launch_bounds__(kThreads, F == Form::kDense && N == 2 ? 1 : 2)
    products(const __grid_constant__ Parts parts, bool gated, Activation activation, const T* x, int batch,
             const T* residual, T* out, int out_rows) {
  __shared__ float table[16];
  __shared__ float sums[kWarps][8 * N][2 * kTile + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < 16) table[threadIdx.x] = codes_on_device.values[threadIdx.x];
  __syncthreads();
  Tiles tiles;
  int rows_before = 0;
  if (gated) {
    tiles = {{&parts.matrix[0], &parts.matrix[1]},
             {static_cast<int>(blockIdx.x) * kTile, static_cast<int>(blockIdx.x) * kTile}};
  } else {
    int part = 0, block = blockIdx.x;
    while (block >= blocks_of(parts.matrix[part])) {
      block -= blocks_of(parts.matrix[part]);
      rows_before += parts.matrix[part++].rows;
    }
    tiles = {{&parts.matrix[part], &parts.matrix[part]}, {block * 2 * kTile, block * 2 * kTile + kTile}};
  }
  float acc[2][N][4] = {};
  if constexpr (F == Form::kDense) {
    by_words<T, Storage::kDense, N>(tiles, x, batch, table, acc);
  } else if constexpr (F == Form::kInt8) {
    by_words<T, Storage::kInt8, N>(tiles, x, batch, table, acc);
  } else if constexpr (F == Form::kNf4) {
    by_words<T, Storage::kNf4, N>(tiles, x, batch, table, acc);
  } else {
    one_by_one<T, N>(tiles, x, batch, table, acc);
  }
  if constexpr (F == Form::kInt8 || F == Form::kOneByOne) add_outliers<T, N>(tiles, x, batch, acc);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[warp][8 * n + lane % 4 * 2 + i % 2][kTile * tile + lane / 4 + 8 * (i / 2)] = acc[tile][n][i];
    }
  }
  __syncthreads();
  const auto total = [&](int of, int place) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w][of][place];
    return sum;
  };
  const int width = gated ? kTile : 2 * kTile;
  for (int i = threadIdx.x; i < batch * width; i += kThreads) {
    const int of = i / width, place = i % width, row = tiles.row[0] + place;
    const Matrix& m = *tiles.matrix[0];
    if (row >= m.rows) continue;
    const int64_t to = int64_t{of} * out_rows + rows_before + row;
    float y = activate(finished<T>(m, row, of, total(of, place)), activation);
    if (gated) {
      y = rounded<T>(y) * finished<T>(*tiles.matrix[1], row, of, total(of, kTile + place));
    } else if (residual != nullptr) {
      y += to_float(residual[to]);
    }
    out[to] = from_float<T>(y);
  }
}

// Rows of 16 columns are read as words.
bool takes_vectors(const Matrix& m) {
  return m.columns % (m.storage == Storage::kNf4 ? kChunk : kPerThread) == 0 &&
         reinterpret_cast<uintptr_t>(m.weight) % 16 == 0;
}

Form form_of(const Matvec& op) {
  const Storage storage = op.parts[0].storage;
  for (int i = 0; i < op.count; ++i) {
    if (!aligned(op.x) || op.parts[i].storage != storage || !takes_vectors(op.parts[i])) return Form::kOneByOne;
  }
  return storage == Storage::kDense ? Form::kDense : storage == Storage::kInt8 ? Form::kInt8 : Form::kNf4;
}

template <typename T, Form F>
void enqueue(const Matvec& op, const Parts& parts, int blocks, int rows, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    kernel<<<blocks, kThreads, 0, stream>>>(parts, op.gated, op.activation, static_cast<const T*>(op.x), op.batch,
                                            static_cast<const T*>(op.residual), static_cast<T*>(op.out), rows);
  };
  if (op.batch > 8) {
    run(products<T, 2, F>);
  } else {
    run(products<T, 1, F>);
  }
}

}  // namespace

Status enqueue_products(const Matvec& op, Type type, void* stream) {
  if (op.batch > kMaxBatch) return "more rows than a product takes at once";
  Parts parts = {};
  int blocks = 0, rows = 0;
  for (int i = 0; i < op.count; ++i) {
    parts.matrix[i] = op.parts[i];
    blocks += blocks_of(op.parts[i]);
    rows += op.parts[i].rows;
  }
  if (op.gated) {
    rows = op.parts[0].rows;
    blocks = (rows + kTile - 1) / kTile;
  }
  const auto to = static_cast<cudaStream_t>(stream);
  with_type(type, [&]<typename T>(T) {
    switch (form_of(op)) {
      case Form::kDense:
        return enqueue<T, Form::kDense>(op, parts, blocks, rows, to);
      case Form::kInt8:
        return enqueue<T, Form::kInt8>(op, parts, blocks, rows, to);
      case Form::kNf4:
        return enqueue<T, Form::kNf4>(op, parts, blocks, rows, to);
      case Form::kOneByOne:
        return enqueue<T, Form::kOneByOne>(op, parts, blocks, rows, to);
    }
  });
  return status();
}

}  // namespace martlet::cuda
