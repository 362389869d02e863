// Halves of a head turned by their angles: (x1, x2) → (x1·cos − x2·sin, x2·cos + x1·sin).
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;

// Products as the reference rounds them: to T with a table of T, not at all with one of float32.
template <typename T, typename Table>
__device__ float product(float a, float b) {
  const float p = __fmul_rn(a, b);
  if constexpr (std::is_same_v<T, Table>) return rounded<T>(p);
  return p;
}

// One thread does N elements of each half. `items`: tokens · heads · half / N.
template <typename T, typename Table, int N>
__global__ void rotate(const T* x, const Table* __restrict__ cos, const Table* __restrict__ sin, T* out, uint32_t items,
                       uint32_t heads, uint32_t half, int64_t token_stride, int64_t head_stride,
                       int64_t out_token_stride, int64_t out_head_stride, float sign) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const uint32_t per_head = half / N, rest = item / per_head, column = item % per_head * N;
  const uint32_t head = rest % heads, token = rest / heads;
  const T* in = x + token * token_stride + head * head_stride + column;
  const auto x1 = load<N>(in), x2 = load<N>(in + half);
  const int64_t place = int64_t{token} * half + column;
  const auto c = load<N>(cos + place), s = load<N>(sin + place);
  Vector<T, N> o1, o2;
  for (int j = 0; j < N; ++j) {
    const float a = to_float(x1.v[j]), b = to_float(x2.v[j]), u = to_float(c.v[j]), v = sign * to_float(s.v[j]);
    o1.v[j] = from_float<T>(__fsub_rn(product<T, Table>(a, u), product<T, Table>(b, v)));
    o2.v[j] = from_float<T>(__fadd_rn(product<T, Table>(b, u), product<T, Table>(a, v)));
  }
  T* to = out + token * out_token_stride + head * out_head_stride + column;
  store<N>(to, o1);
  store<N>(to + half, o2);
}

}  // namespace

Status rotary(const Rotary& op, void* stream) {
  const int32_t half = op.head_dim / 2;
  const int64_t pairs = op.tokens * op.heads * half;
  if (pairs == 0) return nullptr;
  if (pairs >= int64_t{1} << 31) return "more than 2^31 pairs in one rotary embedding";
  // 8 numbers of a float32 table are 32 bytes.
  const bool tables = reinterpret_cast<uintptr_t>(op.cos) % 32 == 0 && reinterpret_cast<uintptr_t>(op.sin) % 32 == 0;
  const bool vectors = half % kVector == 0 && op.token_stride % kVector == 0 && op.head_stride % kVector == 0 &&
                       op.out_token_stride % kVector == 0 && op.out_head_stride % kVector == 0 && aligned(op.x) &&
                       aligned(op.out) && tables;
  with_type(op.type, [&]<typename T>(T) {
    const auto launch = [&]<typename Table, int N>(Table, std::integral_constant<int, N>) {
      const auto items = static_cast<uint32_t>(pairs / N);
      rotate<T, Table, N><<<blocks_for(items, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(op.x), static_cast<const Table*>(op.cos), static_cast<const Table*>(op.sin),
          static_cast<T*>(op.out), items, op.heads, half, op.token_stride, op.head_stride, op.out_token_stride,
          op.out_head_stride, op.inverse ? -1.0f : 1.0f);
    };
    with_width(vectors, [&](auto n) {
      if (op.float_table) {
        launch(float{}, n);
      } else {
        launch(T{}, n);
      }
    });
  });
  return status();
}

}  // namespace martlet::cuda
