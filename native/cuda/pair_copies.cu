// Small things that LoRA pairs need once a step or once a product, each in one launch where ATen takes several.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 16;

struct Pairs {
  PairCopy pair[kMaxPairs];
};

// blocks.y: pairs. N divides a row of A and a row of B.
template <typename T, int N>
__global__ void copy_pairs_of(const __grid_constant__ Pairs pairs) {
  const PairCopy& pair = pairs.pair[blockIdx.y];
  const int first = (blockIdx.x * kThreads + threadIdx.x) * N;
  const T *a = static_cast<const T*>(pair.a), *b = static_cast<const T*>(pair.b);
  for (int i = first; i < pair.rank * pair.in; i += kBlocks * kThreads * N)
    store<N>(static_cast<T*>(pair.to_a) + i / pair.in * pair.a_pitch + i % pair.in, load<N>(a + i));
  for (int i = first; i < pair.rows * pair.rank; i += kBlocks * kThreads * N) {
    auto v = load<N>(b + i);
    for (int j = 0; j < N; ++j) v.v[j] = from_float<T>(to_float(v.v[j]) * pair.scaling);
    store<N>(static_cast<T*>(pair.to_b) + i / pair.rank * pair.b_pitch + i % pair.rank, v);
  }
}

struct Sums {
  Sum sum[kMaxPairs];
};

template <typename T, int N>
__global__ void add_all(const __grid_constant__ Sums sums) {
  const Sum& sum = sums.sum[blockIdx.y];
  T* to = static_cast<T*>(sum.to);
  for (int i = (blockIdx.x * kThreads + threadIdx.x) * N; i < sum.n; i += kBlocks * kThreads * N) {
    auto v = load<N>(to + i);
    const auto w = load<N>(static_cast<const T*>(sum.from) + i);
    for (int j = 0; j < N; ++j) v.v[j] = from_float<T>(to_float(v.v[j]) + to_float(w.v[j]));
    store<N>(to + i, v);
  }
}

}  // namespace

Status copy_pairs(const PairCopy* pairs, int32_t count, Type type, void* stream) {
  if (count > kMaxPairs) return "more pairs than are copied at once";
  Pairs all = {};
  bool vectors = true;
  for (int i = 0; i < count; ++i) {
    const PairCopy& p = all.pair[i] = pairs[i];
    vectors = vectors && p.in % kVector == 0 && p.rank % kVector == 0 && p.a_pitch % kVector == 0 &&
              p.b_pitch % kVector == 0 && aligned(p.a) && aligned(p.b) && aligned(p.to_a) && aligned(p.to_b);
  }
  if (count == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      copy_pairs_of<T, N><<<dim3(kBlocks, count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(all);
    });
  });
  return status();
}

Status add_sums(const Sum* sums, int32_t count, Type type, void* stream) {
  if (count > kMaxPairs) return "more sums than are added at once";
  Sums all = {};
  bool vectors = true;
  for (int i = 0; i < count; ++i) {
    const Sum& s = all.sum[i] = sums[i];
    vectors = vectors && s.n % kVector == 0 && aligned(s.to) && aligned(s.from);
  }
  if (count == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      add_all<T, N><<<dim3(kBlocks, count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(all);
    });
  });
  return status();
}

}  // namespace martlet::cuda
