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

at::Tensor cut_patches(const at::Tensor& frames, int64_t size, int64_t temporal, int64_t merge, PatchGrid& grid) {
  const int64_t channels = frames.size(1), height = frames.size(2), width = frames.size(3), unit = size * merge;
  if (height % unit != 0 || width % unit != 0) {
    fail(code::kImage,
         "A picture of " + std::to_string(width) + "×" + std::to_string(height) +
             " pixels cannot be cut into patches: each side must be a multiple of " + std::to_string(unit) + ".",
         {{"width", width}, {"height", height}, {"multiple", unit}});
  }
  grid = {(frames.size(0) + temporal - 1) / temporal, height / size, width / size};
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

}  // namespace martlet
