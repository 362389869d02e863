#include "core/vision/patch_grid.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "core/base/error.h"

namespace martlet {
namespace {

// fn(row, column) for each patch in order.
void for_each_patch(const PatchGrid& grid, int64_t merge, const std::function<void(int64_t, int64_t)>& fn) {
  for (int64_t t = 0; t < grid.t; ++t) {
    for (int64_t top = 0; top < grid.h; top += merge) {
      for (int64_t left = 0; left < grid.w; left += merge) {
        for (int64_t row = top; row < top + merge; ++row) {
          for (int64_t column = left; column < left + merge; ++column) fn(row, column);
        }
      }
    }
  }
}

}  // namespace

PatchGrid patch_grid(const at::Tensor& frames, int64_t size, int64_t temporal, int64_t merge) {
  const int64_t height = frames.size(2), width = frames.size(3), unit = size * merge;
  if (height % unit != 0 || width % unit != 0) {
    fail(code::kImage,
         "A picture of " + std::to_string(width) + "×" + std::to_string(height) +
             " pixels cannot be cut into patches: each side must be a multiple of " + std::to_string(unit) + ".",
         {{"width", width}, {"height", height}, {"multiple", unit}});
  }
  return {(frames.size(0) + temporal - 1) / temporal, height / size, width / size};
}

at::Tensor cut_patches(const at::Tensor& frames, int64_t size, int64_t temporal, int64_t merge) {
  const PatchGrid grid = patch_grid(frames, size, temporal, merge);
  const int64_t channels = frames.size(1);
  at::Tensor whole = frames;
  if (const int64_t missing = grid.t * temporal - frames.size(0); missing > 0)
    whole = at::cat({frames, frames.narrow(0, frames.size(0) - 1, 1).expand({missing, -1, -1, -1})}, 0);
  return whole.view({grid.t, temporal, channels, grid.h / merge, merge, size, grid.w / merge, merge, size})
      .permute({0, 3, 6, 4, 7, 2, 1, 5, 8})
      .reshape({grid.patches(), channels * temporal * size * size});
}

at::Tensor patch_coordinates(const std::vector<PatchGrid>& grids, int64_t merge) {
  std::vector<int64_t> rows, columns;
  for (const PatchGrid& grid : grids) {
    for_each_patch(grid, merge, [&](int64_t row, int64_t column) {
      rows.push_back(row);
      columns.push_back(column);
    });
  }
  return at::stack({at::tensor(rows, at::kLong), at::tensor(columns, at::kLong)});
}

std::vector<int64_t> frame_lengths(const std::vector<PatchGrid>& grids) {
  std::vector<int64_t> lengths;
  for (const PatchGrid& grid : grids) lengths.insert(lengths.end(), grid.t, grid.h * grid.w);
  return lengths;
}

WindowOrder window_order(const std::vector<PatchGrid>& grids, int64_t merge, int64_t window) {
  WindowOrder order;
  int64_t frame = 0;  // its first token
  for (const PatchGrid& grid : grids) {
    const int64_t h = grid.h / merge, w = grid.w / merge;
    for (int64_t t = 0; t < grid.t; ++t, frame += h * w) {
      for (int64_t top = 0; top < h; top += window) {
        for (int64_t left = 0; left < w; left += window) {
          const int64_t bottom = std::min(top + window, h), right = std::min(left + window, w);
          for (int64_t row = top; row < bottom; ++row) {
            for (int64_t column = left; column < right; ++column) order.tokens.push_back(frame + row * w + column);
          }
          order.lengths.push_back((bottom - top) * (right - left) * merge * merge);
        }
      }
    }
  }
  return order;
}

SampledTable sample_table(const std::vector<PatchGrid>& grids, int64_t merge, int64_t side) {
  struct Taps {
    std::array<int64_t, 2> place;
    std::array<float, 2> weight;
  };
  // In float32, operation by operation as the original.
  const auto taps = [side](int64_t index, int64_t size) {
    const float source =
        static_cast<float>(index) * static_cast<float>(side - 1) / static_cast<float>(std::max<int64_t>(size - 1, 1));
    const float floor = std::floor(source);
    Taps out;
    for (int i = 0; i < 2; ++i) {
      out.place[i] = std::min(static_cast<int64_t>(floor) + i, side - 1);
      out.weight[i] = std::max(1.0f - std::abs(source - floor - static_cast<float>(i)), 0.0f);
    }
    return out;
  };
  std::vector<int64_t> index;
  std::vector<float> weight;
  for (const PatchGrid& grid : grids) {
    for_each_patch(grid, merge, [&](int64_t row, int64_t column) {
      const Taps vertical = taps(row, grid.h), horizontal = taps(column, grid.w);
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          index.push_back(vertical.place[i] * side + horizontal.place[j]);
          weight.push_back(vertical.weight[i] * horizontal.weight[j]);
        }
      }
    });
  }
  return {at::tensor(index, at::kLong).view({-1, 4}), at::tensor(weight, at::kFloat).view({-1, 4})};
}

at::Tensor patches_side_by_side(const at::Tensor& patches) {
  const int64_t n = patches.size(0);
  const auto size = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(patches.size(1)) / 3)));
  return patches.view({n, 3, size, size}).permute({1, 2, 0, 3}).reshape({3, size, n * size});
}

at::Tensor interpolate_table(const at::Tensor& table, int64_t rows) {
  const auto root = [](int64_t n) { return static_cast<int64_t>(std::sqrt(static_cast<double>(n))); };
  const int64_t from = root(table.size(0)), to = root(rows);
  if (from == to) return table;
  const at::Tensor square = table.to(at::kFloat).view({1, from, from, -1}).permute({0, 3, 1, 2});
  return at::upsample_bicubic2d(square, {to, to}, /*align_corners=*/false)
      .permute({0, 2, 3, 1})
      .flatten(0, 2)
      .to(table.scalar_type());
}

namespace {

// torch.arange(start, end, step) in float32 as its kernel for 8 lanes rounds: whole groups of 16 by vectors, whose
// lanes count on from a rounded base, the rest one by one.
std::vector<float> vector_arange(double start, double end, double step) {
  const auto size = static_cast<int64_t>(std::ceil((end - start) / step));
  std::vector<float> out(size);
  for (int64_t i = 0; i < size; ++i) {
    if (i < size / 16 * 16) {
      const auto base = static_cast<float>(start + step * static_cast<double>(i / 8 * 8));
      out[i] = static_cast<float>(static_cast<double>(base) + step * static_cast<double>(i % 8));
    } else {
      out[i] = static_cast<float>(start + step * static_cast<double>(i));
    }
  }
  return out;
}

// For each of n patches along an axis, the row of a table of `side`.
std::vector<int64_t> buckets(int64_t n, int64_t side) {
  const double step = 1.0 / static_cast<double>(side);
  const std::vector<float> boundaries = vector_arange(step, 1.0, step);
  // The number of patches is a tensor in the original, so that its reciprocal is rounded.
  std::vector<int64_t> out;
  for (const float fraction : vector_arange(0.0, 1.0 - 1e-6, static_cast<double>(1.0f / static_cast<float>(n)))) {
    out.push_back(std::upper_bound(boundaries.begin(), boundaries.end(), fraction) - boundaries.begin());
  }
  return out;
}

}  // namespace

at::Tensor bucketed_positions(const PatchGrid& grid, int64_t side) {
  const std::vector<int64_t> rows = buckets(grid.h, side), columns = buckets(grid.w, side);
  std::vector<int64_t> out;
  for_each_patch(grid, 1, [&](int64_t row, int64_t column) { out.push_back(rows[row] * side + columns[column]); });
  return at::tensor(out, at::kLong);
}

at::Tensor sincos_positions(const PatchGrid& grid, int64_t dim) {
  const int64_t quarter = dim / 4;
  // Each step is rounded to float32, as numpy's.
  const auto axis = [&](int64_t n) {
    at::Tensor out = at::empty({n, 2 * quarter}, at::kFloat);
    auto values = out.accessor<float, 2>();
    for (int64_t i = 0; i < quarter; ++i) {
      const float exponent = static_cast<float>(i) / static_cast<float>(quarter);
      const float omega = 1.0f / static_cast<float>(std::pow(10000.0, static_cast<double>(exponent)));
      for (int64_t place = 0; place < n; ++place) {
        const auto angle = static_cast<double>(static_cast<float>(place) * omega);
        values[place][i] = static_cast<float>(std::sin(angle));
        values[place][quarter + i] = static_cast<float>(std::cos(angle));
      }
    }
    return out;
  };
  const at::Tensor rows = axis(grid.h), columns = axis(grid.w);
  return at::cat({columns.unsqueeze(0).expand({grid.h, -1, -1}), rows.unsqueeze(1).expand({-1, grid.w, -1})}, -1)
      .reshape({grid.h * grid.w, dim});
}

}  // namespace martlet
