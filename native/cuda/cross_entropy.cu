// Softmax cross-entropy of rows of logits: a row's maximum, normaliser and sum in one pass, its gradient in a second,
// in place. One block a row; arithmetic in float32.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Of some of a row's logits: the largest and where it stands first, Σ exp(x − largest), Σ x.
struct Partial {
  float largest, normaliser, sum;
  int32_t place;
};

__device__ inline Partial merged(const Partial& a, const Partial& b) {
  const bool take_b = b.largest > a.largest || (b.largest == a.largest && b.place < a.place);
  Partial out = take_b ? b : a;
  // A part without logits has normaliser 0 and largest −∞.
  const auto scaled = [&](const Partial& p) {
    return p.normaliser == 0 ? 0.0f : p.normaliser * expf(p.largest - out.largest);
  };
  out.normaliser = scaled(a) + scaled(b);
  out.sum = a.sum + b.sum;
  return out;
}

__device__ inline Partial of_warp(Partial x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Partial other = {__shfl_xor_sync(0xffffffffu, x.largest, offset),
                           __shfl_xor_sync(0xffffffffu, x.normaliser, offset),
                           __shfl_xor_sync(0xffffffffu, x.sum, offset), __shfl_xor_sync(0xffffffffu, x.place, offset)};
    x = merged(x, other);
  }
  return x;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rows_of_logits(T* logits, const int64_t* __restrict__ targets, float* __restrict__ losses,
                   bool* __restrict__ correct, int32_t columns, float scale, float smoothing, bool gradient) {
  const int64_t row = blockIdx.x;
  logits += row * columns;
  const auto target = static_cast<int32_t>(targets[row]);
  Partial own = {-INFINITY, 0, 0, INT32_MAX};
  for (int32_t i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(logits + i);
    float largest = own.largest;
    for (int j = 0; j < N; ++j) {
      const float x = to_float(in.v[j]);
      if (x > largest || own.place == INT32_MAX) {
        largest = x;
        own.place = i + j;
      }
      own.sum += x;
    }
    if (largest != own.largest) {
      own.normaliser = own.normaliser == 0 ? 0.0f : own.normaliser * expf(own.largest - largest);
      own.largest = largest;
    }
    for (int j = 0; j < N; ++j) own.normaliser += expf(to_float(in.v[j]) - largest);
  }
  __shared__ Partial warps[kWarps];
  own = of_warp(own);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  Partial all = warps[0];
  for (int i = 1; i < kWarps; ++i) all = merged(all, warps[i]);
  const float log_norm = all.largest + logf(all.normaliser);
  if (threadIdx.x == 0) {
    float loss = (1 - smoothing) * (log_norm - to_float(logits[target]));
    if (smoothing > 0) loss += smoothing * (log_norm - all.sum / static_cast<float>(columns));
    losses[row] = loss;
    correct[row] = all.place == target;
  }
  if (!gradient) return;
  __syncthreads();  // the target's logit has been read
  const float share = smoothing / static_cast<float>(columns);
  for (int32_t i = threadIdx.x * N; i < columns; i += kThreads * N) {
    auto x = load<N>(logits + i);
    for (int j = 0; j < N; ++j) {
      float d = expf(to_float(x.v[j]) - log_norm) - share;
      if (i + j == target) d -= 1 - smoothing;
      x.v[j] = from_float<T>(d * scale);
    }
    store<N>(logits + i, x);
  }
}

}  // namespace

Status cross_entropy(const CrossEntropy& op, float scale, float smoothing, bool gradient, float* losses, bool* correct,
                     void* stream) {
  if (op.rows == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && aligned(op.logits);
  with_type(op.type, [&]<typename T>(T) {
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      rows_of_logits<T, N><<<static_cast<unsigned int>(op.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<T*>(op.logits), op.targets, losses, correct, op.columns, scale, smoothing, gradient);
    });
  });
  return status();
}

}  // namespace martlet::cuda
