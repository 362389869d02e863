// Decoding one row reads each weight once for one product: what counts is how many bytes are under way, and how few
// instructions each weight takes. Of 16 bits and int8 a warp does two rows, so that it reads and converts x once for
// both; a lane reads 8 weights of each at a time, kUnroll times before it computes. Of NF4 a block does 16 rows at a
// time with its tensor cores.
#include <algorithm>
#include <limits>

#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"
#include "cuda/mma.cuh"

namespace martlet::cuda {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / 32;
static_assert(kMaxGroup <= kAttentionWarps && kMaxSplits <= 32);
constexpr int kArgmaxThreads = 1024;
constexpr int kMaxNormed = 47 * 1024;  // bytes of a normed row in shared memory
constexpr float kLog2E = 1.44269504f;

// Over each Lanes neighbours of a warp; other lanes need not take part.
template <int Lanes>
__device__ float lanes_sum(float x) {
  const uint32_t mask = Lanes == 32 ? 0xffffffffu : ((uint64_t{1} << Lanes) - 1) << threadIdx.x % 32 / Lanes * Lanes;
  for (int offset = Lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  return x;
}

__device__ inline float warp_sum(float x) { return lanes_sum<32>(x); }

// 8 numbers of 16 bits, the first in the lower half of the first word.
template <typename T>
__device__ void unpack(const uint4& in, float* out) {
  const uint32_t words[] = {in.x, in.y, in.z, in.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out[2 * j] = __uint_as_float(words[j] << 16);
      out[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    } else {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[j]));
      out[2 * j] = both.x;
      out[2 * j + 1] = both.y;
    }
  }
}

// A storage's row, read a Word = 8 weights at a time, in steps of kUnroll words for each of 32 lanes. Words beyond the
// end are 0.
template <typename T>
struct DenseRow {
  using Word = uint4;
  static constexpr int kUnroll = 2;
  const Word* words;

  __device__ DenseRow(const Matrix& m, int row)
      : words(static_cast<const Word*>(m.weight) + int64_t{row} * (m.columns / kVector)) {}
  __device__ float dot(const Word& word, const float* x) const {
    float w[kVector], sum = 0;
    unpack<T>(word, w);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum = fmaf(w[j], x[j], sum);
    return sum;
  }
};

// Of codes: the row's scale comes last.
struct Int8Row {
  using Word = uint2;
  static constexpr int kUnroll = 4;
  const Word* words;

  __device__ Int8Row(const Matrix& m, int row)
      : words(static_cast<const Word*>(m.weight) + int64_t{row} * (m.columns / kVector)) {}
  __device__ float dot(const Word& word, const float* x) const {
    // 2²³ + (code + 128) is a float whose last byte is code + 128: cheaper than a conversion.
    const uint32_t shifted[] = {word.x ^ 0x80808080u, word.y ^ 0x80808080u};
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float code = __uint_as_float(__byte_perm(shifted[j / 4], 0x4b000000u, 0x7440 + j % 4)) - 8388736.0f;
      sum = fmaf(code, x[j], sum);
    }
    return sum;
  }
};

// A step's words of two rows, from word `i` on, of n.
template <typename Row>
struct Step {
  using Word = typename Row::Word;
  Word of_a[Row::kUnroll], of_b[Row::kUnroll];

  __device__ void fetch(const Row& a, const Row& b, int i, int n, int lane) {
#pragma unroll
    for (int u = 0; u < Row::kUnroll; ++u) {
      const int at = i + 32 * u + lane;
      of_a[u] = at < n ? __ldcs(a.words + at) : Word{};
      of_b[u] = at < n ? __ldcs(b.words + at) : Word{};
    }
  }
};

// This lane's parts of two rows · x, n words each, the first step's of which are in `step`.
template <typename T, typename Row>
__device__ float2 row_pair(const Row& a, const Row& b, Step<Row> step, int n, const T* x, int lane) {
  float2 sum = {0, 0};
  for (int i = 0; i < n;) {
#pragma unroll
    for (int u = 0; u < Row::kUnroll; ++u) {
      if (i + 32 * u >= n) break;
      const int at = i + 32 * u + lane;
      // Bits of 0 are the number 0 in both types.
      const uint4 in = at < n ? reinterpret_cast<const uint4*>(x)[at] : make_uint4(0, 0, 0, 0);
      float v[kVector];
      unpack<T>(in, v);
      sum.x += a.dot(step.of_a[u], v);
      sum.y += b.dot(step.of_b[u], v);
    }
    i += 32 * Row::kUnroll;
    if (i < n) step.fetch(a, b, i, n, lane);
  }
  return sum;
}

// What a byte of NF4 codes stands for, two numbers of 16 bits: for each lane a column of its own, so that lanes do not
// wait for each other's banks. The numbers are times kSpread, with which bfloat16 rounds the 16 of them best: by 0.06 %
// (root mean square), a weight of 16 bits by 0.11 %.
constexpr int kNf4Entries = 256;
constexpr float kSpread = 1.437f;
template <typename T>
__device__ void fill_pairs(uint32_t* pairs) {
  static_assert(kThreads == kNf4Entries);
  const int byte = threadIdx.x;
  const Vector<T, 2> both = {from_float<T>(codes_on_device.values[byte >> 4] * kSpread),
                             from_float<T>(codes_on_device.values[byte & 15] * kSpread)};
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(&both);
  // Threads of a quarter warp begin with different banks.
  for (int i = 0; i < 8; ++i)
    reinterpret_cast<uint4*>(pairs)[byte * 8 + (i + byte) % 8] = make_uint4(pair, pair, pair, pair);
}

// Two neighbours.
__host__ __device__ inline int pairs_of(const Matrix& m) { return (m.rows + 1) / 2; }

// The word of a byte's code in this lane's column, which begins at `column`. Rows of the table have 128 bytes: the
// products of bytes, which find a row with one instruction, and shifts take turns, as each has units of its own.
template <int Byte>
__device__ uint32_t look_up(uint32_t codes, uint32_t column) {
  const uint32_t address =
      Byte % 2 == 0 ? __dp4a(codes, 128u << 8 * Byte, column) : column + __byte_perm(codes, 0, 0x4440 + Byte) * 128;
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// Two rows that a warp does: of gate and up, or neighbours.
struct Pair {
  const Matrix *a, *b;
  int part_a, part_b, row_a, row_b, out;

  __device__ Pair(const Parts& parts, bool gated, int pair) {
    if (gated) {
      part_a = 0;
      part_b = 1;
      a = &parts.matrix[0];
      b = &parts.matrix[1];
      row_a = row_b = out = pair;
      return;
    }
    int part = 0, rows_before = 0;
    while (pair >= pairs_of(parts.matrix[part])) {
      pair -= pairs_of(parts.matrix[part]);
      rows_before += parts.matrix[part++].rows;
    }
    part_a = part_b = part;
    a = b = &parts.matrix[part];
    row_a = 2 * pair;
    row_b = min(row_a + 1, a->rows - 1);
    out = rows_before + row_a;
  }
};

// A block's warps do kNf4Step columns of 16 rows in turn, with tensor cores. A lane (g = lane / 4, t = lane % 4) reads
// 32 columns of its two rows, those of pair g, at a time, so t = 0, 1 have one block of 64 weights and t = 2, 3 the
// next: each block's x lies in a column of b of its own, all else there being 0, and what comes out is the sum of each
// row and block, which gets its scale.
constexpr int kNf4Step = 512, kNf4Reads = kNf4Step / 128, kNf4Pairs = 8;

// Where a lane reads a step's codes. Of no step there are 0 columns.
struct Nf4Words {
  const uint4* words[2] = {};
  int columns = 0;  // of the rows, from the lane's first on

  __device__ void place(const Pair& rows, int of_all, int step, int lane) {
    const int first = step * kNf4Step + lane % 4 * 32;
    const uint32_t of_row = of_all / 32, skipped = first / 32;
    columns = of_all - first;
    words[0] = static_cast<const uint4*>(rows.a->weight) + (rows.row_a * of_row + skipped);
    words[1] = static_cast<const uint4*>(rows.b->weight) + (rows.row_b * of_row + skipped);
  }
  __device__ uint4 read(int row, int i) const {
    return i * 128 < columns ? __ldcs(words[row] + i * 4) : make_uint4(0, 0, 0, 0);
  }
};

// The scales of a step's blocks 2t and 2t + 1, of a lane's two rows, as memory has them: whatever is done to them waits
// for them, so of() does it. Not by __ldg, whose loads the compiler would move behind __syncwarp. Paired: rows have an
// even number of blocks, so that two scales are read at once and no 256 begin between them.
template <bool Nested, bool Paired>
struct Nf4Scales {
  float scale[2][2];    // nested: one of each 256 scales; paired too: only the first
  uint32_t code[2][2];  // if nested; paired: both in the first
  int part[2];

  __device__ void read(const Pair& rows, int columns, int step, int lane) {
    part[0] = rows.part_a;
    part[1] = rows.part_b;
    const uint32_t blocks = columns / 64, block = step * (kNf4Step / 64) + lane % 4 * 2;
    read(*rows.a, rows.row_a * blocks, blocks, block, scale[0], code[0]);
    read(*rows.b, rows.row_b * blocks, blocks, block, scale[1], code[1]);
  }
  // first: the row's first block.
  __device__ static void read(const Matrix& m, uint32_t first, uint32_t blocks, uint32_t block, float* scale,
                              uint32_t* code) {
    const auto* scales = static_cast<const float*>(m.scales);
    const auto* codes = static_cast<const uint8_t*>(m.scales);
    const uint32_t at[] = {first + min(block, blocks - (Paired ? 2 : 1)), first + min(block + 1, blocks - 1)};
    if constexpr (Nested && Paired) {
      code[0] = *reinterpret_cast<const uint16_t*>(codes + at[0]);
      scale[0] = m.nested_scales[at[0] / 256];
    } else if constexpr (Paired) {
      const float2 two = *reinterpret_cast<const float2*>(scales + at[0]);
      scale[0] = two.x;
      scale[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (Nested) code[i] = codes[at[i]];
        scale[i] = Nested ? m.nested_scales[at[i] / 256] : scales[at[i]];
      }
    }
  }
  // A row's two scales. maps: each part's nested_map.
  __device__ float2 of(const Parts& parts, const float (*maps)[kNf4Entries], int row) const {
    if constexpr (!Nested) {
      return {scale[row][0], scale[row][1]};
    } else {
      const float offset = parts.matrix[part[row]].nested_offset, *map = maps[part[row]];
      const auto numbered = [&](uint32_t code, float scale) { return __fadd_rn(__fmul_rn(map[code], scale), offset); };
      if constexpr (Paired) {
        return {numbered(code[row][0] % 256, scale[row][0]), numbered(code[row][0] / 256, scale[row][0])};
      } else {
        return {numbered(code[row][0], scale[row][0]), numbered(code[row][1], scale[row][1])};
      }
    }
  }
};

// The same of one row of any shape, a weight at a time.
template <typename T>
__device__ float any_row(const Matrix& m, int row, const T* x, const float* table, int lane) {
  float sum = 0;
  for (int i = lane; i < m.columns; i += 32) {
    const int64_t place = int64_t{row} * m.columns + i;
    float w;
    if (m.storage == Storage::kDense) {
      w = to_float(static_cast<const T*>(m.weight)[place]);
    } else if (m.storage == Storage::kInt8) {
      w = static_cast<const int8_t*>(m.weight)[place];
    } else {
      const uint32_t byte = static_cast<const uint8_t*>(m.weight)[place / 2];
      w = table[place % 2 == 0 ? byte >> 4 : byte & 15] * nf4_scale(m, place / 64);
    }
    sum = fmaf(w, to_float(x[i]), sum);
  }
  return sum;
}

// B's row · (A x), this lane's part of it, of Lanes.
template <typename T, typename L, int Lanes>
__device__ float low_rank(const Lora& lora, int row, int lane) {
  const L* b = static_cast<const L*>(lora.b) + int64_t{row} * lora.rank;
  float sum = 0;
  for (int i = lane; i < lora.rank; i += Lanes) {
    const float low = lora.low[i];
    // As the linear keeps it.
    sum = fmaf(to_float(b[i]), std::is_same_v<L, float> ? low : rounded<T>(low), sum);
  }
  return sum;
}

// The parts of Lanes lanes → row · x + bias as the linear rounds it, and the adapter's part; every lane has it.
template <typename T, int Lanes>
__device__ float finished(const Matrix& m, int row, float sum, const T* x, int lane) {
  if (m.storage == Storage::kInt8) {
    sum *= static_cast<const float*>(m.scales)[row] * static_cast<float>(1.0 / 127.0);
    const T* kept = static_cast<const T*>(m.outlier_values) + int64_t{row} * m.outliers;
    for (int i = lane; i < m.outliers; i += Lanes) sum += to_float(kept[i]) * to_float(x[m.outlier_columns[i]]);
  }
  sum = lanes_sum<Lanes>(sum);
  if (m.bias != nullptr) sum += to_float(static_cast<const T*>(m.bias)[row]);
  sum = rounded<T>(sum);
  if (m.lora.a == nullptr) return sum;
  const float added =
      m.lora.is_float ? low_rank<T, float, Lanes>(m.lora, row, lane) : low_rank<T, T, Lanes>(m.lora, row, lane);
  return rounded<T>(fmaf(m.lora.scaling, lanes_sum<Lanes>(added), sum));
}

// What becomes of a product's rows, and where.
template <typename T>
struct Output {
  bool gated;
  Activation activation;
  const T* residual;
  T* out;

  // Of the parts that Lanes lanes have of a pair's rows.
  template <int Lanes>
  __device__ void write(const Pair& rows, float2 sum, const T* x, int lane) const {
    const float2 y = {finished<T, Lanes>(*rows.a, rows.row_a, sum.x, x, lane),
                      finished<T, Lanes>(*rows.b, rows.row_b, sum.y, x, lane)};
    if (gated) {
      if (lane == 0) out[rows.out] = from_float<T>(rounded<T>(activate(y.x, activation)) * y.y);
      return;
    }
    // Two lanes write.
    if (lane >= 2 || rows.row_a + lane >= rows.a->rows) return;
    float result = activate(lane == 0 ? y.x : y.y, activation);
    if (residual != nullptr) result += to_float(residual[rows.out + lane]);
    out[rows.out + lane] = from_float<T>(result);
  }
};

// RMSNorm in Llama's order, as rms_norm.cu; LayerNorm rounds at its end. The block's threads do N numbers at a time.
template <typename T, int N>
__device__ void norm_row(const T* x, const Norm& norm, float eps, T* out, int columns) {
  const auto sum_over_row = [&](auto&& of) {
    float sum = 0;
    for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
      const auto in = load<N>(x + i);
      for (int j = 0; j < N; ++j) sum += of(to_float(in.v[j]));
    }
    return row_sum<kThreads>(sum);
  };
  const T *weights = static_cast<const T*>(norm.weight), *biases = static_cast<const T*>(norm.bias);
  const auto n = static_cast<float>(columns);
  const float mean = biases == nullptr ? 0.0f : sum_over_row([](float v) { return v; }) / n;
  const float rstd = rsqrtf(sum_over_row([mean](float v) { return (v - mean) * (v - mean); }) / n + eps);
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(x + i), weight = load<N>(weights + i);
    Vector<T, N> y, bias = {};
    if (biases != nullptr) bias = load<N>(biases + i);
    for (int j = 0; j < N; ++j) {
      const float unit = (to_float(in.v[j]) - mean) * rstd, w = to_float(weight.v[j]);
      y.v[j] = from_float<T>(biases == nullptr ? rounded<T>(unit) * w : fmaf(unit, w, to_float(bias.v[j])));
    }
    store<N>(out + i, y);
  }
}

// x, or with a norm x normed into the block's shared memory. The block must meet before it is read.
template <typename T>
__device__ const T* normed_row(const T* x, const Norm& norm, float eps, int columns) {
  extern __shared__ uint4 shared[];
  if (norm.weight == nullptr) return x;
  T* normed = reinterpret_cast<T*>(shared);
  if (aligned(x) && aligned(norm.weight) && aligned(norm.bias) && columns % kVector == 0) {
    norm_row<T, kVector>(x, norm, eps, normed, columns);
  } else {
    norm_row<T, 1>(x, norm, eps, normed, columns);
  }
  return normed;
}

// A block does a row of A · norm(x), of all parts' adapters one after the other; blocks.y are rows of x.
template <typename T>
__global__ void lora_down(const Parts parts, const T* x, const Norm norm, float eps) {
  let_next_start();
  const int columns = parts.matrix[0].columns, of = blockIdx.y;
  int part = 0, row = blockIdx.x;
  while (row >= parts.matrix[part].lora.rank) row -= parts.matrix[part++].lora.rank;
  const Lora& lora = parts.matrix[part].lora;
  wait_for_earlier();
  x = normed_row(x + int64_t{of} * columns, norm, eps, columns);
  __syncthreads();
  const auto dot = [&]<typename L>(const L* a) {
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < columns; i += kThreads) sum = fmaf(to_float(a[i]), to_float(x[i]), sum);
    return sum;
  };
  const int64_t begin = int64_t{row} * columns;
  const float sum = row_sum<kThreads>(lora.is_float ? dot(static_cast<const float*>(lora.a) + begin)
                                                    : dot(static_cast<const T*>(lora.a) + begin));
  if (threadIdx.x == 0) lora.low[of * lora.rank + row] = sum;
}

// How a product's weights are read: one by one where rows or x are such that words cannot be, or storages differ.
enum class Form { kDense, kInt8, kNf4, kOneByOne };

// With a norm each block norms x anew, into its shared memory: x is small beside the rows.
template <typename T, Form F>
__global__ void __launch_bounds__(kThreads, 4) matvec(const __grid_constant__ Parts parts, const T* x, const Norm norm,
                                                      float eps, const Output<T> output, int pairs) {
  static_assert(F != Form::kNf4);
  const int lane = threadIdx.x % 32, columns = parts.matrix[0].columns;
  const int pair = blockIdx.x * kWarps + threadIdx.x / 32;
  float2 sum = {0, 0};
  let_next_start();
  const Pair own(parts, output.gated, min(pair, pairs - 1));
  // The first weights are on their way before x is there.
  const auto by_words = [&]<typename Row>(const Row& a, const Row& b) {
    Step<Row> step;
    step.fetch(a, b, 0, columns / kVector, lane);
    wait_for_earlier();
    x = normed_row(x, norm, eps, columns);
    __syncthreads();
    if (pair < pairs) sum = row_pair<T>(a, b, step, columns / kVector, x, lane);
  };
  if constexpr (F == Form::kDense) {
    by_words(DenseRow<T>(*own.a, own.row_a), DenseRow<T>(*own.b, own.row_b));
  } else if constexpr (F == Form::kInt8) {
    by_words(Int8Row(*own.a, own.row_a), Int8Row(*own.b, own.row_b));
  } else {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = codes_on_device.values[threadIdx.x];
    wait_for_earlier();
    x = normed_row(x, norm, eps, columns);
    __syncthreads();
    sum = {any_row<T>(*own.a, own.row_a, x, table, lane), any_row<T>(*own.b, own.row_b, x, table, lane)};
  }
  // Not own, which would take registers until here.
  if (pair < pairs) output.template write<32>(Pair(parts, output.gated, pair), sum, x, lane);
}

// A block stays and does every gridDim.x-th group of 16 rows (kNf4Pairs pairs): the table and norm(x) serve all of
// them. Its warps share out the steps of all its groups, one after the other, and a step's codes are brought while
// those of the warp's step before are computed with. What the warps have of a group's rows waits in shared memory until
// kNf4Kept groups are done.
constexpr int kNf4Kept = 16;
template <typename T, bool Nested, bool Paired>
__global__ void __launch_bounds__(kThreads, 2)
    nf4_matvec(const __grid_constant__ Parts parts, const T* x, const Norm norm, float eps, const Output<T> output,
               int pairs) {
  static_assert(kWarps == kNf4Pairs && kNf4Kept % kWarps == 0);
  __shared__ __align__(16) uint32_t table[kNf4Entries * 32];
  __shared__ float maps[3][kNf4Entries];
  __shared__ float2 sums[kNf4Kept][kWarps][kNf4Pairs];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = parts.matrix[0].columns;
  const int steps = (columns + kNf4Step - 1) / kNf4Step;
  // As many as there are groups, or fewer.
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int groups = ((pairs + kNf4Pairs - 1) / kNf4Pairs - block + blocks - 1) / blocks;
  const auto pair_at = [&](int group, int i) { return (block + group * blocks) * kNf4Pairs + i; };
  const auto rows_at = [&](int pair) { return Pair(parts, output.gated, min(pair, pairs - 1)); };
  // Of a warp the steps warp, warp + kWarps … of all groups'.
  struct Place {
    int group, step;
  };
  const auto settled = [steps](Place at) {
    for (; at.step >= steps; at.step -= steps) ++at.group;
    return at;
  };
  let_next_start();
  Nf4Words words;
  Nf4Scales<Nested, Paired> scales, next_scales;
  // Beyond the last group no codes are read, but for simplicity the last row's scales.
  const auto place = [&](Place to, Nf4Scales<Nested, Paired>& its) {
    const Pair rows = rows_at(pair_at(to.group, lane / 4));
    words.place(rows, columns, to.step, lane);
    if (to.group >= groups) words.columns = 0;
    its.read(rows, columns, to.step, lane);
  };
  Place at = settled({0, warp});
  place(at, scales);
  uint4 codes[2][kNf4Reads];
#pragma unroll
  for (int i = 0; i < kNf4Reads; ++i) {
    codes[0][i] = words.read(0, i);
    codes[1][i] = words.read(1, i);
  }
  fill_pairs<T>(table);
  if constexpr (Nested) {
    for (int part = 0; part < 3; ++part) {
      const float* map = parts.matrix[part].nested_map;
      if (map != nullptr) maps[part][threadIdx.x] = map[threadIdx.x];
    }
  }
  wait_for_earlier();
  x = normed_row(x, norm, eps, columns);
  __syncthreads();
  const auto column = static_cast<uint32_t>(__cvta_generic_to_shared(table + lane));
  // Of a step's reads a lane has the x of one at most: its column of b is block g of the step, which read g / 2 has, in
  // the lanes whose t / 2 = g % 2.
  const int own_read = lane / 8;
  uint32_t own_x[16];
  const auto read_x = [&](int step) {
    const int from = step * kNf4Step + own_read * 128 + lane % 4 * 32;
    const bool there = lane % 4 / 2 == lane / 4 % 2 && from < columns;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 four = there ? reinterpret_cast<const uint4*>(x + from)[i] : make_uint4(0, 0, 0, 0);
      own_x[4 * i] = four.x;
      own_x[4 * i + 1] = four.y;
      own_x[4 * i + 2] = four.z;
      own_x[4 * i + 3] = four.w;
    }
  };
  read_x(at.step);
  float2 sum = {0, 0};
  for (int begin = 0; begin < groups; begin += kNf4Kept) {
    // Of kNf4Kept groups each warp has as many steps as the others, so that step j is always warp j % kWarps'.
    const int end = min(begin + kNf4Kept, groups);
    while (at.group < end) {
      const Place next = settled({at.group, at.step + kWarps});
      place(next, next_scales);
      float acc[2][4] = {};
#pragma unroll
      for (int read = 0; read < kNf4Reads; ++read) {
        const uint32_t of[2][4] = {{codes[0][read].x, codes[0][read].y, codes[0][read].z, codes[0][read].w},
                                   {codes[1][read].x, codes[1][read].y, codes[1][read].z, codes[1][read].w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto own = [&](int j) { return own_read == read ? own_x[4 * i + j] : 0; };
          const uint32_t first[] = {look_up<0>(of[0][i], column), look_up<0>(of[1][i], column),
                                    look_up<1>(of[0][i], column), look_up<1>(of[1][i], column)};
          const uint32_t second[] = {look_up<2>(of[0][i], column), look_up<2>(of[1][i], column),
                                     look_up<3>(of[0][i], column), look_up<3>(of[1][i], column)};
          const uint32_t b[] = {own(0), own(1), own(2), own(3)};
          mma<T>(acc[0], first, b);
          mma<T>(acc[1], second, b + 2);
        }
        codes[0][read] = words.read(0, read);
        codes[1][read] = words.read(1, read);
        __syncwarp();  // else the compiler puts off these reads until after most look-ups
      }
      read_x(next.step);
      const auto scaled = [&](int row) {
        const float2 both = scales.of(parts, maps, row);
        return fmaf(acc[0][2 * row] + acc[1][2 * row], both.x, (acc[0][2 * row + 1] + acc[1][2 * row + 1]) * both.y);
      };
      sum.x += scaled(0);
      sum.y += scaled(1);
      if (next.group != at.group) {
        sum = {lanes_sum<4>(sum.x), lanes_sum<4>(sum.y)};
        if (lane % 4 == 0) sums[at.group - begin][warp][lane / 4] = {sum.x * (1 / kSpread), sum.y * (1 / kSpread)};
        sum = {0, 0};
      }
      at = next;
      scales = next_scales;
    }
    __syncthreads();
    // As many lanes as warps do a pair. Of fewer steps than warps not every warp has a part of each group.
    const int own_lane = lane % kWarps, parts_of_sum = min(steps, kWarps);
    for (int i = threadIdx.x / kWarps; i < (end - begin) * kNf4Pairs; i += kThreads / kWarps) {
      const int group = i / kNf4Pairs, pair = pair_at(begin + group, i % kNf4Pairs);
      const int from = (group * steps + own_lane) % kWarps;
      const float2 part = own_lane < parts_of_sum ? sums[group][from][i % kNf4Pairs] : float2{0, 0};
      if (pair < pairs) output.template write<kWarps>(rows_at(pair), part, x, own_lane);
    }
    __syncthreads();
  }
}

bool takes_vectors(const Matrix& m) {
  const auto lies_at = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (m.storage == Storage::kNf4) return m.columns % 64 == 0 && lies_at(m.weight, 16) && lies_at(m.scales, 8);
  return m.columns % kVector == 0 && lies_at(m.weight, m.storage == Storage::kInt8 ? 8 : 16);
}

Form form_of(const Matvec& op) {
  const Storage storage = op.parts[0].storage;
  for (int i = 0; i < op.count; ++i) {
    const Matrix& m = op.parts[i];
    if (!aligned(op.x) || m.storage != storage || !takes_vectors(m)) return Form::kOneByOne;
    if ((m.nested_map == nullptr) != (op.parts[0].nested_map == nullptr)) return Form::kOneByOne;
  }
  return storage == Storage::kDense ? Form::kDense : storage == Storage::kInt8 ? Form::kInt8 : Form::kNf4;
}

template <typename T>
__global__ void norm_rows(const T* x, const Norm norm, float eps, T* out, int columns) {
  let_next_start();
  wait_for_earlier();
  const int64_t begin = int64_t{blockIdx.x} * columns;
  x += begin;
  out += begin;
  if (aligned(x) && aligned(out) && aligned(norm.weight) && aligned(norm.bias) && columns % kVector == 0) {
    norm_row<T, kVector>(x, norm, eps, out, columns);
  } else {
    norm_row<T, 1>(x, norm, eps, out, columns);
  }
}

// Several rows: normed once, not by each block.
Status enqueue_matmul(Matvec op, Type type, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const int columns = op.parts[0].columns;
  Parts parts = {};
  int ranks = 0;
  for (int i = 0; i < op.count; ++i) {
    parts.matrix[i] = op.parts[i];
    ranks += op.parts[i].lora.rank;
  }
  with_type(type, [&]<typename T>(T) {
    if (op.norm.weight != nullptr) {
      launch(norm_rows<T>, op.batch, kThreads, 0, to, static_cast<const T*>(op.x), op.norm, op.eps,
             static_cast<T*>(op.normed), columns);
      op.x = op.normed;
    }
    if (ranks > 0)
      launch(lora_down<T>, dim3(ranks, op.batch), kThreads, 0, to, parts, static_cast<const T*>(op.x), Norm{}, 0.0f);
  });
  return enqueue_products(op, type, stream);
}

template <typename Fn>
void with_bool(bool value, const Fn& fn) {
  if (value) {
    fn(std::true_type{});
  } else {
    fn(std::false_type{});
  }
}

// How many blocks the GPU holds at once.
template <typename Kernel>
unsigned int resident_blocks(Kernel kernel, size_t shared_bytes) {
  int device = 0, processors = 0, of_each = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, kThreads, shared_bytes);
  return static_cast<unsigned int>(std::max(processors * of_each, 1));
}

Status enqueue_matvec(const Matvec& op, Type type, void* stream) {
  if (op.batch > 1) return enqueue_matmul(op, type, stream);
  Parts parts = {};
  int pairs = 0, ranks = 0;
  for (int i = 0; i < op.count; ++i) {
    parts.matrix[i] = op.parts[i];
    ranks += op.parts[i].lora.rank;
    pairs += pairs_of(op.parts[i]);
  }
  if (op.gated) pairs = op.parts[0].rows;  // row i of gate and of up
  const size_t bytes = op.norm.weight == nullptr ? 0 : static_cast<size_t>(op.parts[0].columns) * 2;
  if (bytes > kMaxNormed) return "a normed row of more than 24,064 numbers";
  const auto to = static_cast<cudaStream_t>(stream);
  with_type(type, [&]<typename T>(T) {
    if (ranks > 0)
      launch(lora_down<T>, ranks, kThreads, bytes, to, parts, static_cast<const T*>(op.x), op.norm, op.eps);
    const auto run = [&](auto kernel, bool stays) {
      // Beyond 48 KiB with the kernel's own.
      if (bytes > 0) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxNormed);
      const unsigned int most = stays ? resident_blocks(kernel, bytes) : std::numeric_limits<unsigned int>::max();
      launch(kernel, std::min(blocks_for(pairs, kWarps), most), kThreads, bytes, to, parts, static_cast<const T*>(op.x),
             op.norm, op.eps,
             Output<T>{op.gated, op.activation, static_cast<const T*>(op.residual), static_cast<T*>(op.out)}, pairs);
    };
    switch (form_of(op)) {
      case Form::kDense:
        return run(matvec<T, Form::kDense>, false);
      case Form::kInt8:
        return run(matvec<T, Form::kInt8>, false);
      case Form::kNf4:
        return with_bool(op.parts[0].nested_map != nullptr, [&]<bool Nested>(std::bool_constant<Nested>) {
          with_bool(op.parts[0].columns % 128 == 0,
                    [&]<bool Paired>(std::bool_constant<Paired>) { run(nf4_matvec<T, Nested, Paired>, true); });
        });
      case Form::kOneByOne:
        return run(matvec<T, Form::kOneByOne>, false);
    }
  });
  return status();
}

// Products of the rotation as rotary.cu rounds them.
template <typename T, typename Table>
__device__ float turned(float a, float b) {
  const float p = __fmul_rn(a, b);
  if constexpr (std::is_same_v<T, Table>) return rounded<T>(p);
  return p;
}

// A warp does a head of q, k or v of a row (blocks.y). q stays in `qkv`; k and v go to their place in the cache. cos
// null: no rotation.
template <typename T, typename Table>
__global__ void place(T* qkv, const T* q_norm, const T* k_norm, float eps, const Table* cos, const Table* sin,
                      const T* query_scale, T* keys, T* values, const int32_t* step_at, const int32_t* prompts,
                      int steps, int capacity, int heads, int kv_heads, int head_dim) {
  let_next_start();
  wait_for_earlier();
  const int head = blockIdx.x, row = blockIdx.y, lane = threadIdx.x, half = head_dim / 2, step = *step_at;
  T* x = qkv + (int64_t{row} * gridDim.x + head) * head_dim;
  const int64_t slot = (int64_t{row} * capacity + prompts[row] + step) * kv_heads;
  const int64_t turn = int64_t{row} * steps + step;
  if (head >= heads + kv_heads) {
    T* to = values + (slot + head - heads - kv_heads) * head_dim;
    for (int i = lane; i < head_dim; i += 32) to[i] = x[i];
    return;
  }
  const bool query = head < heads;
  const T* norm = query ? q_norm : k_norm;
  float rstd = 1;
  if (norm != nullptr) {
    float squares = 0;
    for (int i = lane; i < head_dim; i += 32) squares += to_float(x[i]) * to_float(x[i]);
    rstd = rsqrtf(warp_sum(squares) / static_cast<float>(head_dim) + eps);
  }
  T* to = query ? x : keys + (slot + head - heads) * head_dim;
  const float scale = query && query_scale != nullptr ? to_float(query_scale[turn]) : 1.0f;
  for (int i = lane; i < half; i += 32) {
    float a = to_float(x[i]), b = to_float(x[i + half]);
    if (norm != nullptr) {
      a = rounded<T>(rounded<T>(a * rstd) * to_float(norm[i]));
      b = rounded<T>(rounded<T>(b * rstd) * to_float(norm[i + half]));
    }
    const int64_t at = turn * half + i;
    const float c = cos != nullptr ? to_float(cos[at]) : 1.0f, s = cos != nullptr ? to_float(sin[at]) : 0.0f;
    const float first = rounded<T>(__fsub_rn(turned<T, Table>(a, c), turned<T, Table>(b, s)));
    const float second = rounded<T>(__fadd_rn(turned<T, Table>(b, c), turned<T, Table>(a, s)));
    to[i] = from_float<T>(first * scale);
    to[i + half] = from_float<T>(second * scale);
  }
}

// What the queries attend to, each row's in its own.
template <typename T>
struct Context {
  const T *keys, *values;  // [rows, capacity, kv_heads, head_dim]
  int capacity;
  const int32_t* lengths;  // [rows]: before step 0's, which is there too where there are steps
  const int32_t* step;     // null: it does not grow
  int kv_heads;
  const T* bias;  // as Decode::distance_bias
  int distances;
};

// The first `count` of 8 numbers; the rest are 0. Vectors: all of them or none.
template <typename T, bool Vectors>
__device__ uint4 eight(const T* from, int count) {
  if constexpr (Vectors) {
    return count > 0 ? __ldcs(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  } else {
    Vector<T, kVector> in = {};
    for (int j = 0; j < kVector; ++j) {
      if (j < count) in.v[j] = from[j];
    }
    return *reinterpret_cast<const uint4*>(&in);
  }
}

// The query heads of one key: `chunks` blocks do `per` of them each, or fewer.
struct Group {
  int heads, chunks, per;
};

// Softmax's running maximum may be −∞ (no key yet): then all weights are 0, not NaN.
__device__ inline float finite_or_zero(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// One part of the context for `count` ≤ G query heads of a row that share their keys: each key is read once for all of
// them, by Lanes lanes, 8 numbers each. Each group of Lanes lanes has its own keys and its own softmax, in powers of 2;
// they meet at the end. Of several parts, the block that comes last adds them up.
// q: [rows, query_heads, head_dim], its first heads. partial: of [rows, heads, splits] the values' sums before they are
// divided, [head_dim], then of each the maximum and the sum. arrivals: [rows, gridDim.x], zeros.
template <typename T, int Lanes, int G, bool Vectors>
__global__ void __launch_bounds__(kAttentionThreads, 4)
    attend(const T* q, int query_heads, const Context<T> context, const Group group, float* partial, uint32_t* arrivals,
           T* out, int head_dim, float scale) {
  constexpr int kGroups = 32 / Lanes, kBlockKeys = kAttentionWarps * kGroups;
  // Keys, and as many values, that a lane asks for before it uses the first: as registers allow.
  constexpr int kKeys = G <= 2 ? 4 : 2;
  __shared__ float maxima[kAttentionWarps][G], sums[kAttentionWarps][G];
  __shared__ __align__(16) float mixed[kAttentionWarps][G][Lanes * kVector];
  let_next_start();
  wait_for_earlier();
  const int row = blockIdx.z, split = blockIdx.y, splits = gridDim.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int place = lane % Lanes * kVector;
  const int heads = context.kv_heads * group.heads;
  const int kv_head = blockIdx.x / group.chunks, skipped = blockIdx.x % group.chunks * group.per;
  const int head = kv_head * group.heads + skipped, count = min(group.per, group.heads - skipped);
  const int64_t first = int64_t{row} * heads + head;  // of all rows' heads
  const int length = context.lengths[row] + (context.step != nullptr ? *context.step + 1 : 0);
  const int share = (length + splits - 1) / splits, begin = min(split * share, length),
            end = min(begin + share, length);
  const int64_t stride = int64_t{context.kv_heads} * head_dim;
  const int own = begin + warp * kGroups + lane / Lanes, numbers = head_dim - place;
  const int64_t shift = (int64_t{row} * context.capacity + own) * stride + kv_head * head_dim + place;
  const T *keys = context.keys + shift, *values = context.values + shift;
  float query[G][kVector], acc[G][kVector] = {}, highest[G], sum[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    highest[g] = -INFINITY;
    const int64_t at = int64_t{row} * query_heads + head + min(g, count - 1);
    unpack<T>(eight<T, Vectors>(q + at * head_dim + place, numbers), query[g]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) query[g][j] *= scale * kLog2E;
  }
  // A warp's lanes go on together, as they exchange numbers.
  for (int k0 = own; k0 - lane / Lanes < end; k0 += kKeys * kBlockKeys) {
    uint4 key[kKeys], value[kKeys];
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const int there = k0 + n * kBlockKeys < end ? numbers : 0;
      key[n] = eight<T, Vectors>(keys, there);
      value[n] = eight<T, Vectors>(values, there);
      keys += kBlockKeys * stride;
      values += kBlockKeys * stride;
    }
    float score[G][kKeys];
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const int k = k0 + n * kBlockKeys;
      float x[kVector];
      unpack<T>(key[n], x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < kVector; ++j) dot = fmaf(query[g][j], x[j], dot);
#pragma unroll
        for (int offset = Lanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        if (k < end && context.bias != nullptr) {
          const int distance = min(length - 1 - k, context.distances - 1);
          const T* of_head = context.bias + (head + min(g, count - 1)) * context.distances;
          dot = fmaf(to_float(of_head[distance]), kLog2E, dot);
        }
        score[g][n] = k < end ? dot : -INFINITY;
      }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float next = highest[g];
#pragma unroll
      for (int n = 0; n < kKeys; ++n) next = fmaxf(next, score[g][n]);
      const float base = finite_or_zero(next), shrink = exp2f(highest[g] - base);
      highest[g] = next;
      sum[g] *= shrink;
#pragma unroll
      for (int j = 0; j < kVector; ++j) acc[g][j] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        score[g][n] = exp2f(score[g][n] - base);  // the key's weight
        sum[g] += score[g][n];
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      float x[kVector];
      unpack<T>(value[n], x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) acc[g][j] = fmaf(score[g][n], x[j], acc[g][j]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float top = highest[g];
#pragma unroll
    for (int offset = Lanes; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float shrink = exp2f(highest[g] - finite_or_zero(top));
    const auto over_groups = [shrink](float x) {
      x *= shrink;
#pragma unroll
      for (int offset = Lanes; offset < 32; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
      return x;
    };
    sum[g] = over_groups(sum[g]);
    Vector<float, kVector> y;
#pragma unroll
    for (int j = 0; j < kVector; ++j) y.v[j] = over_groups(acc[g][j]);
    if (lane < Lanes) *reinterpret_cast<Vector<float, kVector>*>(&mixed[warp][g][place]) = y;
    if (lane == 0) {
      maxima[warp][g] = top;
      sums[warp][g] = sum[g];
    }
  }
  __syncthreads();
  float2* ends = reinterpret_cast<float2*>(partial + int64_t{gridDim.z} * heads * splits * head_dim);
  for (int g = 0; g < count; ++g) {
    float top = -INFINITY, weights[kAttentionWarps], total = 0;
    for (int w = 0; w < kAttentionWarps; ++w) top = fmaxf(top, maxima[w][g]);
    for (int w = 0; w < kAttentionWarps; ++w) {
      weights[w] = exp2f(maxima[w][g] - finite_or_zero(top));
      total += weights[w] * sums[w][g];
    }
    const int64_t part = (first + g) * splits + split;
    const float last = splits == 1 ? 1.0f / total : 1.0f;
#pragma unroll 1
    for (int e = threadIdx.x; e < head_dim; e += kAttentionThreads) {
      float y = 0;
      for (int w = 0; w < kAttentionWarps; ++w) y += weights[w] * mixed[w][g][e];
      if (splits == 1) {
        out[(first + g) * head_dim + e] = from_float<T>(y * last);
      } else {
        partial[part * head_dim + e] = y;
      }
    }
    if (splits > 1 && threadIdx.x == 0) ends[part] = {top, total};
  }
  if (splits == 1) return;

  // Who sees a block's arrival sees what it wrote before. The last one leaves 0 behind.
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(arrivals + row * gridDim.x + blockIdx.x, splits - 1) == static_cast<uint32_t>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  __shared__ float shares[G][32];
  if (warp < count) {
    float2 end_of = {-INFINITY, 0};
    if (lane < splits) end_of = __ldcg(ends + (first + warp) * splits + lane);
    float top = end_of.x;
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float weight = exp2f(end_of.x - finite_or_zero(top));
    shares[warp][lane] = weight / warp_sum(weight * end_of.y);
  }
  __syncthreads();
  constexpr int kWidth = Vectors ? 4 : 1;
  const int columns = head_dim / kWidth;
  for (int i = threadIdx.x; i < count * columns; i += kAttentionThreads) {
    const int g = i / columns, e = i % columns * kWidth;
    const float* from = partial + (first + g) * splits * head_dim + e;
    float y[kWidth] = {};
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const float weight = shares[g][s];
      if constexpr (Vectors) {
        const float4 in = __ldcg(reinterpret_cast<const float4*>(from + int64_t{s} * head_dim));
        y[0] = fmaf(weight, in.x, y[0]);
        y[1] = fmaf(weight, in.y, y[1]);
        y[2] = fmaf(weight, in.z, y[2]);
        y[3] = fmaf(weight, in.w, y[3]);
      } else {
        y[0] = fmaf(weight, __ldcg(from + int64_t{s} * head_dim), y[0]);
      }
    }
    Vector<T, kWidth> rounded_y;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) rounded_y.v[j] = from_float<T>(y[j]);
    store<kWidth>(out + (first + g) * head_dim + e, rounded_y);
  }
}

template <typename T>
void enqueue_attend(const Decode& op, int query_heads, const Context<T>& context, cudaStream_t stream) {
  const int heads = op.heads / context.kv_heads, chunks = chunks_of(heads), per = (heads + chunks - 1) / chunks;
  const auto run = [&](auto kernel, const Group& group) {
    launch(kernel, dim3(context.kv_heads * group.chunks, op.splits, op.batch), kAttentionThreads, 0, stream,
           static_cast<const T*>(op.qkv), query_heads, context, group, op.partial,
           reinterpret_cast<uint32_t*>(op.arrivals), static_cast<T*>(op.mixed), op.head_dim, op.scale);
  };
  if (op.head_dim % kVector != 0 || !aligned(op.qkv) || !aligned(context.keys) || !aligned(context.values) ||
      !aligned(op.partial) || !aligned(op.mixed)) {
    run(attend<T, 32, 1, false>, {heads, heads, 1});
    return;
  }
  const Group group = {heads, chunks, per};
  const auto with_lanes = [&]<int Lanes>(std::integral_constant<int, Lanes>) {
    if (per == 1) {
      run(attend<T, Lanes, 1, true>, group);
    } else if (per == 2) {
      run(attend<T, Lanes, 2, true>, group);
    } else {
      run(attend<T, Lanes, kMaxGroup, true>, group);
    }
  };
  if (op.head_dim <= 64) {
    with_lanes(std::integral_constant<int, 8>{});
  } else if (op.head_dim <= 128) {
    with_lanes(std::integral_constant<int, 16>{});
  } else {
    with_lanes(std::integral_constant<int, 32>{});
  }
}

Status enqueue_attention(const Decode& op, int32_t index, void* stream) {
  if (op.head_dim > kMaxHeadDim || op.head_dim % 2 != 0 || op.heads % op.kv_heads != 0 || op.splits > kMaxSplits)
    return "attention heads of a shape that the kernel does not take";
  const DecodeLayer& layer = op.layers[index];
  const auto to = static_cast<cudaStream_t>(stream);
  with_type(op.type, [&]<typename T>(T) {
    const auto placed = [&]<typename Table>(Table) {
      launch(place<T, Table>, dim3(op.heads + 2 * op.kv_heads, op.batch), 32, 0, to, static_cast<T*>(op.qkv),
             static_cast<const T*>(layer.q_norm), static_cast<const T*>(layer.k_norm), op.eps,
             static_cast<const Table*>(op.cos), static_cast<const Table*>(op.sin),
             static_cast<const T*>(op.query_scale), static_cast<T*>(layer.keys), static_cast<T*>(layer.values), op.step,
             op.prompts, op.steps, op.capacity, op.heads, op.kv_heads, op.head_dim);
    };
    if (op.float_table) {
      placed(float{});
    } else {
      placed(T{});
    }
    enqueue_attend<T>(op, op.heads + 2 * op.kv_heads,
                      {static_cast<const T*>(layer.keys), static_cast<const T*>(layer.values), op.capacity, op.prompts,
                       op.step, op.kv_heads, static_cast<const T*>(op.distance_bias), op.distances},
                      to);
  });
  return status();
}

Status enqueue_cross_attention(const Decode& op, int32_t index, void* stream) {
  if (op.head_dim > kMaxHeadDim || op.head_dim % 2 != 0 || op.splits > kMaxSplits)
    return "attention heads of a shape that the kernel does not take";
  const DecodeLayer& layer = op.layers[index];
  with_type(op.type, [&]<typename T>(T) {
    enqueue_attend<T>(op, op.heads,
                      {static_cast<const T*>(layer.cross_keys), static_cast<const T*>(layer.cross_values), op.memory,
                       op.memories, nullptr, op.heads, nullptr, 0},
                      static_cast<cudaStream_t>(stream));
  });
  return status();
}

// A token that is none (the logits were not finite) reads row 0: its results are thrown away.
template <typename T>
__global__ void embed(const T* table, const int64_t* token, const T* positions, const int32_t* step, T* out, int steps,
                      int hidden) {
  wait_for_earlier();
  // Not before: what the caller's own kernels wrote, the next ones read without waiting.
  let_next_start();
  const int row = blockIdx.x;
  table += max(token[row], int64_t{0}) * hidden;
  if (positions != nullptr) positions += (int64_t{row} * steps + *step) * hidden;
  out += int64_t{row} * hidden;
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    const T x = table[i];
    out[i] = positions != nullptr ? from_float<T>(to_float(x) + to_float(positions[i])) : x;
  }
}

// A block a row. Of equal logits the lowest id, as at::max; −1 if the highest is not finite or there is a NaN.
template <typename T>
__global__ void argmax(const T* logits, int vocab, int64_t* token, int32_t* step) {
  __shared__ float values[32];
  __shared__ int ids[32];
  let_next_start();
  wait_for_earlier();
  logits += int64_t{blockIdx.x} * vocab;
  float best = -INFINITY;
  int id = vocab;
  const auto take = [&](float value, int at) {
    // A NaN wins over all, as +∞ does.
    if (isnan(value)) value = INFINITY;
    if (value > best || (value == best && at < id)) {
      best = value;
      id = at;
    }
  };
  for (int i = threadIdx.x; i < vocab; i += kArgmaxThreads) take(to_float(logits[i]), i);
  const auto reduce = [&] {
    for (int offset = 16; offset > 0; offset /= 2) {
      const float value = __shfl_xor_sync(0xffffffffu, best, offset);
      const int at = __shfl_xor_sync(0xffffffffu, id, offset);
      take(value, at);
    }
  };
  reduce();
  if (threadIdx.x % 32 == 0) {
    values[threadIdx.x / 32] = best;
    ids[threadIdx.x / 32] = id;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = values[threadIdx.x];
  id = ids[threadIdx.x];
  reduce();
  if (threadIdx.x != 0) return;
  token[blockIdx.x] = isinf(best) ? -1 : id;
  if (blockIdx.x == 0) ++*step;
}

Status enqueue_step(const Decode& op, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  with_type(op.type, [&]<typename T>(T) {
    launch(embed<T>, op.batch, kThreads, 0, to, static_cast<const T*>(op.embedding), op.token,
           static_cast<const T*>(op.positions), op.step, static_cast<T*>(op.states), op.steps, op.hidden);
  });
  Status error = status();
  const auto run = [&](Matvec product) {
    product.batch = op.batch;
    product.normed = op.normed;
    product.sums = op.sums;
    product.arrived = op.arrived;
    if (error == nullptr) error = enqueue_matvec(product, op.type, stream);
  };
  // Of the normed states.
  const auto read = [&](const Matrix* parts, int count, const Norm& norm, void* out) {
    run({.parts = parts, .count = count, .x = op.states, .norm = norm, .eps = op.eps, .out = out});
  };
  const auto add = [&](const Matrix& matrix, const void* x) {
    run({.parts = &matrix, .count = 1, .x = x, .residual = op.states, .out = op.states});
  };
  for (int i = 0; i < op.num_layers && error == nullptr; ++i) {
    const DecodeLayer& layer = op.layers[i];
    read(layer.qkv, layer.qkv_parts, layer.input_norm, op.qkv);
    if (error == nullptr) error = enqueue_attention(op, i, stream);
    add(layer.out, op.mixed);
    if (layer.cross_keys != nullptr) {
      read(&layer.cross_q, 1, layer.cross_norm, op.qkv);
      if (error == nullptr) error = enqueue_cross_attention(op, i, stream);
      add(layer.cross_out, op.mixed);
    }
    const bool gated = layer.gate.rows > 0;
    const Matrix gate_up[] = {layer.gate, layer.up};
    run({.parts = gated ? gate_up : &layer.up,
         .count = gated ? 2 : 1,
         .gated = gated,
         .activation = op.activation,
         .x = op.states,
         .norm = layer.mlp_norm,
         .eps = op.eps,
         .out = op.product});
    add(layer.down, op.product);
  }
  read(&op.head, 1, op.final_norm, op.logits);
  if (error != nullptr) return error;
  with_type(op.type, [&]<typename T>(T) {
    launch(argmax<T>, op.batch, kArgmaxThreads, 0, to, static_cast<const T*>(op.logits), op.head.rows, op.token,
           op.step);
  });
  return status();
}

struct Captured {
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t done[2] = {};
  cudaStream_t last = nullptr;
  bool used = false;
  const int64_t* token = nullptr;
  int32_t batch = 1;
};

Status message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not to be found again by the next launch
  return cudaGetErrorString(error);
}

void release(void* graph) {
  auto* captured = static_cast<Captured*>(graph);
  if (captured == nullptr) return;
  if (captured->used) cudaStreamSynchronize(captured->last);
  for (const cudaEvent_t event : captured->done) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (captured->exec != nullptr) cudaGraphExecDestroy(captured->exec);
  delete captured;
}

Status capture(const Decode& op, void** graph) {
  *graph = nullptr;
  auto* captured = new Captured{};
  captured->token = op.token;
  captured->batch = op.batch;
  cudaStream_t own = nullptr;
  cudaGraph_t recorded = nullptr;
  Status error = message(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
  if (error == nullptr) error = message(cudaStreamBeginCapture(own, cudaStreamCaptureModeRelaxed));
  if (error == nullptr) {
    error = enqueue_step(op, own);
    const Status ended = message(cudaStreamEndCapture(own, &recorded));
    if (error == nullptr) error = ended;
  }
  if (error == nullptr) error = message(cudaGraphInstantiate(&captured->exec, recorded, 0));
  for (cudaEvent_t& event : captured->done) {
    if (error == nullptr) error = message(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  if (recorded != nullptr) cudaGraphDestroy(recorded);
  if (own != nullptr) cudaStreamDestroy(own);
  if (error != nullptr) {
    release(captured);
  } else {
    *graph = captured;
  }
  return error;
}

Status replay(void* graph, int64_t* token, int32_t slot, void* stream) {
  auto* captured = static_cast<Captured*>(graph);
  captured->last = static_cast<cudaStream_t>(stream);
  captured->used = true;
  Status error = message(cudaGraphLaunch(captured->exec, captured->last));
  if (error == nullptr) {
    error = message(cudaMemcpyAsync(token, captured->token, captured->batch * sizeof(int64_t), cudaMemcpyDeviceToHost,
                                    captured->last));
  }
  if (error == nullptr) error = message(cudaEventRecord(captured->done[slot], captured->last));
  return error;
}

Status wait(void* graph, int32_t slot) {
  return message(cudaEventSynchronize(static_cast<Captured*>(graph)->done[slot]));
}

}  // namespace

const DecodeKernels decode_kernels = {
    enqueue_matvec, enqueue_attention, enqueue_cross_attention, enqueue_step, capture, replay, wait, release};

}  // namespace martlet::cuda
