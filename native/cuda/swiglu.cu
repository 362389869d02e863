// silu(gate) · up and its gradients, each tensor touched once. Rounded where ATen's separate operations round.
#include "cuda/fp8.cuh"

namespace martlet::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One element as ATen rounds it.
template <typename T>
__device__ T product(T gate, T up) {
  const float x = to_float(gate);
  return from_float<T>(rounded<T>(x / (1.0f + expf(-x))) * to_float(up));
}

template <typename T>
__device__ void gradients(T gate, T up, T dy, T& dgate, T& dup) {
  const float x = to_float(gate), d = to_float(dy), s = sigmoid(x);
  dgate = from_float<T>(rounded<T>(d * to_float(up)) * s * (1.0f + x * (1.0f - s)));
  dup = from_float<T>(rounded<T>(x / (1.0f + expf(-x))) * d);
}

template <typename T, int N>
__global__ void forward(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (i >= n) return;
  const auto g = load<N>(gate + i), u = load<N>(up + i);
  Vector<T, N> y;
  for (int j = 0; j < N; ++j) y.v[j] = product(g.v[j], u.v[j]);
  store<N>(out + i, y);
}

template <typename T, int N>
__global__ void backward(const T* __restrict__ gate, const T* __restrict__ up, const T* __restrict__ dy,
                         T* __restrict__ dgate, T* __restrict__ dup, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (i >= n) return;
  const auto g = load<N>(gate + i), u = load<N>(up + i), grad = load<N>(dy + i);
  Vector<T, N> dg, du;
  for (int j = 0; j < N; ++j) gradients(g.v[j], u.v[j], grad.v[j], dg.v[j], du.v[j]);
  store<N>(dgate + i, dg);
  store<N>(dup + i, du);
}

// Halves of rows: gate [columns], up [columns], the next row `pitch` further. One thread does N elements of each half;
// `items`: rows · columns / N.
template <typename T, int N>
__global__ void forward_halves(const T* __restrict__ gate_up, int64_t pitch, T* __restrict__ out, int64_t out_pitch,
                               uint32_t items, uint32_t columns) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const uint32_t per_row = columns / N, row = item / per_row, column = item % per_row * N;
  const T* gate = gate_up + row * pitch + column;
  const auto g = load<N>(gate), u = load<N>(gate + columns);
  Vector<T, N> y;
  for (int j = 0; j < N; ++j) y.v[j] = product(g.v[j], u.v[j]);
  store<N>(out + row * out_pitch + column, y);
}

template <typename T, int N>
__global__ void backward_halves(T* gate_up, int64_t pitch, T* dy, int64_t out_pitch, uint32_t items, uint32_t columns) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const uint32_t per_row = columns / N, row = item / per_row, column = item % per_row * N;
  T* gate = gate_up + row * pitch + column;
  dy += row * out_pitch + column;
  const auto g = load<N>(gate), u = load<N>(gate + columns), grad = load<N>(dy);
  Vector<T, N> y, dg, du;
  for (int j = 0; j < N; ++j) {
    y.v[j] = product(g.v[j], u.v[j]);
    gradients(g.v[j], u.v[j], grad.v[j], dg.v[j], du.v[j]);
  }
  store<N>(gate, dg);
  store<N>(gate + columns, du);
  store<N>(dy, y);
}

// The same with a row's codes of fp8, a block a row: what codes are made of is kept in shared memory.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1536 / kThreads)
    forward_coded(const T* __restrict__ gate_up, int64_t pitch, T* __restrict__ out, int64_t out_pitch, int columns,
                  const Fp8Codes codes) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* row = reinterpret_cast<T*>(shared);
  const T* gate = gate_up + blockIdx.x * pitch;
  out += blockIdx.x * out_pitch;
  float largest = 0;
  for (int i = threadIdx.x * kVector; i < columns; i += kThreads * kVector) {
    const auto g = load<kVector>(gate + i), u = load<kVector>(gate + columns + i);
    Vector<T, kVector> y;
    for (int j = 0; j < kVector; ++j) y.v[j] = product(g.v[j], u.v[j]);
    store<kVector>(out + i, y);
    store<kVector>(row + i, y);
    largest = fp8_largest(largest, y, codes.factors, i);
  }
  write_codes<kThreads, /*kE5m2=*/false>(codes, row, blockIdx.x, columns, largest);
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    backward_coded(T* gate_up, int64_t pitch, T* dy, int64_t out_pitch, int columns, const Fp8Codes codes) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* row = reinterpret_cast<T*>(shared);  // both gradients
  T* gate = gate_up + blockIdx.x * pitch;
  dy += blockIdx.x * out_pitch;
  float largest = 0;
  for (int i = threadIdx.x * kVector; i < columns; i += kThreads * kVector) {
    const auto g = load<kVector>(gate + i), u = load<kVector>(gate + columns + i), grad = load<kVector>(dy + i);
    Vector<T, kVector> y, dg, du;
    for (int j = 0; j < kVector; ++j) {
      y.v[j] = product(g.v[j], u.v[j]);
      gradients(g.v[j], u.v[j], grad.v[j], dg.v[j], du.v[j]);
    }
    store<kVector>(gate + i, dg);
    store<kVector>(gate + columns + i, du);
    store<kVector>(dy + i, y);
    store<kVector>(row + i, dg);
    store<kVector>(row + columns + i, du);
    largest = fp8_largest(largest, dg, codes.factors, i);
    largest = fp8_largest(largest, du, codes.factors, columns + i);
  }
  write_codes<kThreads, /*kE5m2=*/false>(codes, row, blockIdx.x, 2 * columns, largest);
}

// fn(integral constant of N, items)
template <typename Fn>
Status with_halves(int64_t rows, int32_t columns, bool vectors, const Fn& fn) {
  if (rows * columns == 0) return nullptr;
  const int64_t n = vectors ? kVector : 1;
  if (rows * columns / n >= int64_t{1} << 32) return "more than 2^32 items in one SwiGLU";
  const auto items = static_cast<uint32_t>(rows * columns / n);
  with_width(vectors, [&](auto width) { fn(width, items); });
  return status();
}

}  // namespace

Status swiglu(const void* gate, const void* up, void* out, int64_t n, Type type, void* stream) {
  if (n == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    const bool vectors = n % kVector == 0 && aligned(gate) && aligned(up) && aligned(out);
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      forward<T, N><<<blocks_for(n, kThreads * N), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), n);
    });
  });
  return status();
}

Status swiglu_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n, Type type,
                       void* stream) {
  if (n == 0) return nullptr;
  with_type(type, [&]<typename T>(T) {
    const bool vectors =
        n % kVector == 0 && aligned(gate) && aligned(up) && aligned(dy) && aligned(dgate) && aligned(dup);
    with_width(vectors, [&]<int N>(std::integral_constant<int, N>) {
      backward<T, N><<<blocks_for(n, kThreads * N), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(dy), static_cast<T*>(dgate),
          static_cast<T*>(dup), n);
    });
  });
  return status();
}

Status swiglu_halves(const void* gate_up, int64_t pitch, void* out, int64_t out_pitch, int64_t rows, int32_t columns,
                     Type type, const Fp8Codes& codes, void* stream) {
  const bool vectors =
      columns % kVector == 0 && pitch % kVector == 0 && out_pitch % kVector == 0 && aligned(gate_up) && aligned(out);
  if (codes.codes != nullptr) {
    const int64_t bytes = int64_t{columns} * 2;
    if (rows == 0) return nullptr;
    if (vectors && takes(codes) && with_shared_row(bytes, [&]<int kBlock>(std::integral_constant<int, kBlock>) {
          with_type(type, [&]<typename T>(T) {
            const auto kernel = forward_coded<T, kBlock>;
            allow_shared(kernel, bytes);
            kernel<<<static_cast<unsigned int>(rows), kBlock, bytes, static_cast<cudaStream_t>(stream)>>>(
                static_cast<const T*>(gate_up), pitch, static_cast<T*>(out), out_pitch, columns, codes);
          });
        }))
      return status();
    const Status plain = swiglu_halves(gate_up, pitch, out, out_pitch, rows, columns, type, {}, stream);
    return plain != nullptr ? plain : fp8_quantize_rows(rows_of(out, out_pitch, rows, columns, type, codes), stream);
  }
  return with_halves(rows, columns, vectors, [&](auto n, uint32_t items) {
    with_type(type, [&]<typename T>(T) {
      forward_halves<T, n.value><<<blocks_for(items, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(gate_up), pitch, static_cast<T*>(out), out_pitch, items, columns);
    });
  });
}

Status swiglu_halves_backward(void* gate_up, int64_t pitch, void* dy, int64_t out_pitch, int64_t rows, int32_t columns,
                              Type type, const Fp8Codes& codes, void* stream) {
  const bool vectors =
      columns % kVector == 0 && pitch % kVector == 0 && out_pitch % kVector == 0 && aligned(gate_up) && aligned(dy);
  if (codes.codes != nullptr) {
    const int64_t bytes = int64_t{columns} * 2 * 2;
    if (rows == 0) return nullptr;
    if (vectors && takes(codes) && with_shared_row(bytes, [&]<int kBlock>(std::integral_constant<int, kBlock>) {
          with_type(type, [&]<typename T>(T) {
            const auto kernel = backward_coded<T, kBlock>;
            allow_shared(kernel, bytes);
            kernel<<<static_cast<unsigned int>(rows), kBlock, bytes, static_cast<cudaStream_t>(stream)>>>(
                static_cast<T*>(gate_up), pitch, static_cast<T*>(dy), out_pitch, columns, codes);
          });
        }))
      return status();
    const Status plain = swiglu_halves_backward(gate_up, pitch, dy, out_pitch, rows, columns, type, {}, stream);
    return plain != nullptr ? plain
                            : fp8_quantize_rows(rows_of(gate_up, pitch, rows, 2 * columns, type, codes), stream);
  }
  return with_halves(rows, columns, vectors, [&](auto n, uint32_t items) {
    with_type(type, [&]<typename T>(T) {
      backward_halves<T, n.value><<<blocks_for(items, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<T*>(gate_up), pitch, static_cast<T*>(dy), out_pitch, items, columns);
    });
  });
}

}  // namespace martlet::cuda
