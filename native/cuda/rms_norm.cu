// A row is read twice; the second time it comes from the cache. kThreads threads share a row, a block has several rows
// where those are 32.
#include "cuda/fp8.cuh"

namespace martlet::cuda {
namespace {

constexpr int kWarpRows = 4;  // rows of a block where a warp does one

template <int kThreads>
constexpr int rows_of_block = kThreads == 32 ? kWarpRows : 1;

// With `sum`: of sum + x, which is put into sum. kCodes: those of y too, which a block then has room for in shared
// memory (N is kVector).
template <typename T, int kThreads, int N, bool kAdd, bool kCodes>
__global__ void forward(const T* __restrict__ x, const T* __restrict__ weight, T* sum, T* __restrict__ y,
                        float* __restrict__ rstd, int64_t rows, int columns, int64_t out_pitch, float eps,
                        const Fp8Codes codes) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t row = int64_t{blockIdx.x} * rows_of_block<kThreads> + threadIdx.y;
  if (row >= rows) return;
  T* kept = reinterpret_cast<T*>(shared) + threadIdx.y * columns;
  float largest = 0;
  x += row * columns;
  y += row * out_pitch;
  float squares = 0;
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    auto in = load<N>(x + i);
    if constexpr (kAdd) {
      const auto before = load<N>(sum + row * columns + i);
      for (int j = 0; j < N; ++j) in.v[j] = from_float<T>(to_float(before.v[j]) + to_float(in.v[j]));
      store<N>(sum + row * columns + i, in);
    }
    for (int j = 0; j < N; ++j) squares += to_float(in.v[j]) * to_float(in.v[j]);
  }
  const float scale = rsqrtf(row_sum<kThreads>(squares) / static_cast<float>(columns) + eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[row] = scale;
  for (int i = threadIdx.x * N; i < columns; i += kThreads * N) {
    // Each thread reads what it has written itself.
    const auto in = load<N>(kAdd ? sum + row * columns + i : x + i), w = load<N>(weight + i);
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) out.v[j] = from_float<T>(rounded<T>(to_float(in.v[j]) * scale) * to_float(w.v[j]));
    store<N>(y + i, out);
    if constexpr (kCodes) {
      store<N>(kept + i, out);
      largest = fp8_largest(largest, out, codes.factors, i);
    }
  }
  // Each thread reads what it has kept itself.
  if constexpr (kCodes) write_codes<kThreads, /*kE5m2=*/false>(codes, kept, row, columns, largest);
}

// With g = dy · weight and x̂ = x · rstd: dx = rstd · (g − x̂ · mean(g · x̂)). kAdd: plus residual, which may be dx, and
// y in place of dy. Without it dy is only read.
template <typename T, int kThreads, int N, bool kAdd>
__global__ void backward(const T* __restrict__ x, const T* __restrict__ weight, T* dy, const float* __restrict__ rstd,
                         const T* residual, T* dx, int64_t rows, int columns, int64_t out_pitch,
                         int64_t residual_pitch) {
  const int64_t row = int64_t{blockIdx.x} * rows_of_block<kThreads> + threadIdx.y;
  if (row >= rows) return;
  x += row * columns;
  dy += row * columns;
  dx += row * out_pitch;
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
    if constexpr (kAdd) {
      const auto before = load<N>(residual + row * residual_pitch + i);
      Vector<T, N> y;
      for (int j = 0; j < N; ++j) {
        out.v[j] = from_float<T>(to_float(before.v[j]) + to_float(out.v[j]));
        y.v[j] = from_float<T>(rounded<T>(to_float(in.v[j]) * scale) * to_float(w.v[j]));
      }
      store<N>(dy + i, y);
    }
    store<N>(dx + i, out);
  }
}

// fn(integral constant of kThreads, integral constant of N)
template <typename Fn>
void with_shape(int32_t columns, bool vectors, const Fn& fn) {
  with_width(vectors, [&](auto n) {
    if (columns <= 512) {
      fn(std::integral_constant<int, 32>{}, n);
    } else if (columns <= 2048) {
      fn(std::integral_constant<int, 128>{}, n);
    } else {
      fn(std::integral_constant<int, 256>{}, n);
    }
  });
}

template <bool kAdd>
Status enqueue_forward(const RmsNorm& op, void* sum, double eps, void* y, float* rstd, void* stream) {
  if (op.rows == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && op.out_pitch % kVector == 0 && aligned(op.x) &&
                       aligned(op.weight) && aligned(sum) && aligned(y);
  // 48 KiB are any block's; wider rows get their codes afterwards.
  const bool wanted = op.y_codes.codes != nullptr,
             coded = wanted && vectors && takes(op.y_codes) && op.columns <= 24 * 1024 - 512;
  with_type(op.type, [&]<typename T>(T) {
    with_shape(op.columns, vectors, [&](auto threads, auto n) {
      constexpr int rows = rows_of_block<threads.value>;
      const auto run = [&](auto codes, int64_t bytes) {
        forward<T, threads.value, n.value, kAdd, codes.value>
            <<<blocks_for(op.rows, rows), dim3(threads.value, rows), bytes, static_cast<cudaStream_t>(stream)>>>(
                static_cast<const T*>(op.x), static_cast<const T*>(op.weight), static_cast<T*>(sum), static_cast<T*>(y),
                rstd, op.rows, op.columns, op.out_pitch, static_cast<float>(eps), op.y_codes);
      };
      if constexpr (n.value == kVector) {
        if (coded) return run(std::true_type{}, rows * op.columns * int64_t{sizeof(T)});
      }
      run(std::false_type{}, 0);
    });
  });
  if (!wanted || coded) return status();
  return fp8_quantize_rows(rows_of(y, op.out_pitch, op.rows, op.columns, op.type, op.y_codes), stream);
}

template <bool kAdd>
Status enqueue_backward(const RmsNorm& op, void* dy, const float* rstd, const void* residual, void* dx, void* stream) {
  if (op.rows == 0) return nullptr;
  const bool vectors = op.columns % kVector == 0 && op.out_pitch % kVector == 0 && op.residual_pitch % kVector == 0 &&
                       aligned(op.x) && aligned(op.weight) && aligned(dy) && aligned(residual) && aligned(dx);
  with_type(op.type, [&]<typename T>(T) {
    with_shape(op.columns, vectors, [&](auto threads, auto n) {
      constexpr int rows = rows_of_block<threads.value>;
      backward<T, threads.value, n.value, kAdd>
          <<<blocks_for(op.rows, rows), dim3(threads.value, rows), 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(op.x), static_cast<const T*>(op.weight), static_cast<T*>(dy), rstd,
              static_cast<const T*>(residual), static_cast<T*>(dx), op.rows, op.columns, op.out_pitch,
              op.residual_pitch);
    });
  });
  return status();
}

}  // namespace

Status rms_norm(const RmsNorm& op, double eps, void* y, float* rstd, void* stream) {
  return enqueue_forward<false>(op, nullptr, eps, y, rstd, stream);
}

Status add_rms_norm(const RmsNorm& op, void* sum, double eps, void* y, float* rstd, void* stream) {
  return enqueue_forward<true>(op, sum, eps, y, rstd, stream);
}

Status rms_norm_backward(const RmsNorm& op, const void* dy, const float* rstd, void* dx, void* stream) {
  return enqueue_backward<false>(op, const_cast<void*>(dy), rstd, nullptr, dx, stream);
}

Status rms_norm_backward_add(const RmsNorm& op, void* dy, const float* rstd, const void* residual, void* dx,
                             void* stream) {
  return enqueue_backward<true>(op, dy, rstd, residual, dx, stream);
}

}  // namespace martlet::cuda
