// A row is read twice; the second time it comes from the cache. kThreads threads share a row, a block has several rows
// where those are 32.
#include "cuda/vector.cuh"

namespace martlet::cuda {
namespace {

constexpr int kWarpRows = 4;  // rows of a block where a warp does one

template <int kThreads>
constexpr int rows_of_block = kThreads == 32 ? kWarpRows : 1;

template <typename T, int kThreads, int N>
__global__ void forward(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y,
                        float* __restrict__ rstd, int64_t rows, int columns, float eps) {
  const int64_t row = int64_t{blockIdx.x} * rows_of_block<kThreads> + threadIdx.y;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  float squares = 0;
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(x + i);
    for (int j = 0; j < N; ++j) squares += to_float(in.v[j]) * to_float(in.v[j]);
  }
  const float scale = rsqrtf(row_sum<kThreads>(squares) / static_cast<float>(columns) + eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[row] = scale;
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(x + i), w = load<N>(weight + i);
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) out.v[j] = from_float<T>(rounded<T>(to_float(in.v[j]) * scale) * to_float(w.v[j]));
    store<N>(y + i, out);
  }
}

// With g = dy · weight and x̂ = x · rstd: dx = rstd · (g − x̂ · mean(g · x̂)).
template <typename T, int kThreads, int N>
__global__ void backward(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ dy,
                         const float* __restrict__ rstd, T* __restrict__ dx, int64_t rows, int columns) {
  const int64_t row = int64_t{blockIdx.x} * rows_of_block<kThreads> + threadIdx.y;
  if (row >= rows) return;
  x += row * columns;
  dy += row * columns;
  dx += row * columns;
  const float scale = rstd[row];
  float products = 0;
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(x + i), w = load<N>(weight + i), grad = load<N>(dy + i);
    for (int j = 0; j < N; ++j) products += to_float(grad.v[j]) * to_float(w.v[j]) * (to_float(in.v[j]) * scale);
  }
  const float mean = row_sum<kThreads>(products) / static_cast<float>(columns);
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    const auto in = load<N>(x + i), w = load<N>(weight + i), grad = load<N>(dy + i);
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) {
      const float g = to_float(grad.v[j]) * to_float(w.v[j]);
      out.v[j] = from_float<T>(scale * (g - to_float(in.v[j]) * scale * mean));
    }
    store<N>(dx + i, out);
  }
}

// fn(integral constant of kThreads, integral constant of N)
template <typename Fn>
void with_shape(int32_t columns, bool vectors, const Fn& fn) {
  const auto threads = [&](auto n) {
    if (columns <= 512) {
      fn(std::integral_constant<int, 32>{}, n);
    } else if (columns <= 2048) {
      fn(std::integral_constant<int, 128>{}, n);
    } else {
      fn(std::integral_constant<int, 256>{}, n);
    }
  };
  if (vectors) {
    threads(std::integral_constant<int, kVector>{});
  } else {
    threads(std::integral_constant<int, 1>{});
  }
}

}  // namespace

Status rms_norm(const RmsNorm& op, double eps, void* y, float* rstd, void* stream) {
  if (op.rows == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && aligned(op.x) && aligned(op.weight) && aligned(y);
  with_type(op.type, [&]<typename T>(T) {
    with_shape(op.columns, vectors, [&](auto threads, auto n) {
      constexpr int rows = rows_of_block<threads.value>;
      forward<T, threads.value, n.value>
          <<<blocks_for(op.rows, rows), dim3(threads.value, rows), 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(op.x), static_cast<const T*>(op.weight), static_cast<T*>(y), rstd, op.rows,
              op.columns, static_cast<float>(eps));
    });
  });
  return status();
}

Status rms_norm_backward(const RmsNorm& op, const void* dy, const float* rstd, void* dx, void* stream) {
  if (op.rows == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && aligned(op.x) && aligned(op.weight) && aligned(dy) && aligned(dx);
  with_type(op.type, [&]<typename T>(T) {
    with_shape(op.columns, vectors, [&](auto threads, auto n) {
      constexpr int rows = rows_of_block<threads.value>;
      backward<T, threads.value, n.value>
          <<<blocks_for(op.rows, rows), dim3(threads.value, rows), 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(op.x), static_cast<const T*>(op.weight), static_cast<const T*>(dy), rstd,
              static_cast<T*>(dx), op.rows, op.columns);
    });
  });
  return status();
}

}  // namespace martlet::cuda
