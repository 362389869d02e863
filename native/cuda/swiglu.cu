// silu(gate) · up and its gradients, each tensor touched once. Rounded where ATen's separate operations round.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T, int N>
__global__ void forward(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (i >= n) return;
  const auto g = load<N>(gate + i), u = load<N>(up + i);
  Vector<T, N> y;
  for (int j = 0; j < N; ++j) {
    const float x = to_float(g.v[j]);
    y.v[j] = from_float<T>(rounded<T>(x / (1.0f + expf(-x))) * to_float(u.v[j]));
  }
  store<N>(out + i, y);
}

template <typename T, int N>
__global__ void backward(const T* __restrict__ gate, const T* __restrict__ up, const T* __restrict__ dy,
                         T* __restrict__ dgate, T* __restrict__ dup, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (i >= n) return;
  const auto g = load<N>(gate + i), u = load<N>(up + i), grad = load<N>(dy + i);
  Vector<T, N> dg, du;
  for (int j = 0; j < N; ++j) {
    const float x = to_float(g.v[j]), d = to_float(grad.v[j]), s = sigmoid(x);
    dg.v[j] = from_float<T>(rounded<T>(d * to_float(u.v[j])) * s * (1.0f + x * (1.0f - s)));
    du.v[j] = from_float<T>(rounded<T>(x / (1.0f + expf(-x))) * d);
  }
  store<N>(dgate + i, dg);
  store<N>(dup + i, du);
}

}  // namespace

Status swiglu(const void* gate, const void* up, void* out, int64_t n, Type type, void* stream) {
  if (n == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    const auto launch = [&]<int N>(std::integral_constant<int, N>) {
      forward<T, N><<<blocks_for(n, kThreads * N), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), n);
    };
    if (n % kVector == 0 && aligned(gate) && aligned(up) && aligned(out)) {
      launch(std::integral_constant<int, kVector>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
  });
  return status();
}

Status swiglu_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n, Type type,
                       void* stream) {
  if (n == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    const auto launch = [&]<int N>(std::integral_constant<int, N>) {
      backward<T, N><<<blocks_for(n, kThreads * N), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(dy), static_cast<T*>(dgate),
          static_cast<T*>(dup), n);
    };
    if (n % kVector == 0 && aligned(gate) && aligned(up) && aligned(dy) && aligned(dgate) && aligned(dup)) {
      launch(std::integral_constant<int, kVector>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
  });
  return status();
}

}  // namespace martlet::cuda
