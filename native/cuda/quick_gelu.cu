// x · sigmoid(1.702 x) in one pass (CLIP's activation). Rounded where ATen's separate operations round.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void quick_gelu_of(const T* x, T* out, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (i >= n) return;
  const auto in = load<N>(x + i);
  Vector<T, N> y;
  for (int j = 0; j < N; ++j) {
    const float v = to_float(in.v[j]), scaled = rounded<T>(v * 1.702f);
    y.v[j] = from_float<T>(v * rounded<T>(1.0f / (1.0f + expf(-scaled))));
  }
  store<N>(out + i, y);
}

}  // namespace

Status quick_gelu(const void* x, void* out, int64_t n, Type type, void* stream) {
  if (n == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    with_width(n % kVector == 0 && aligned(x) && aligned(out), [&]<int N>(std::integral_constant<int, N>) {
      quick_gelu_of<T, N><<<blocks_for(n, kThreads * N), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(x), static_cast<T*>(out), n);
    });
  });
  return status();
}

}  // namespace martlet::cuda
