#include "core/vision/patch_grid.h"

#include <ATen/ATen.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "check.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

TEST("rows of a position table by fractions: the original's for every number of patches up to 160") {
  const json table =
      json::parse(read_bytes(std::filesystem::path(MARTLET_FIXTURES) / "minicpm_v" / "position_buckets.json"));
  const int64_t side = table["side"].get<int64_t>();
  int64_t n = 0;
  for (const json& expected : table["rows"]) {
    ++n;
    const at::Tensor rows = at::tensor(expected.get<std::vector<int64_t>>(), at::kLong);
    EXPECT_EQ(rows.numel(), n);
    EXPECT_SAME(bucketed_positions({1, n, 1}, side), rows * side);
    EXPECT_SAME(bucketed_positions({1, 1, n}, side), rows);
  }
  EXPECT_EQ(n, 160);
  // Rows of patches come first.
  EXPECT_SAME(bucketed_positions({1, 2, 3}, 6), at::tensor({0, 2, 4, 18, 20, 22}, at::kLong));
}

TEST("sine and cosine positions: the column's half first") {
  const int64_t dim = 16, h = 3, w = 5, quarter = dim / 4;
  const at::Tensor positions = sincos_positions({1, h, w}, dim).view({h, w, dim});
  for (int64_t row = 0; row < h; ++row) {
    for (int64_t column = 0; column < w; ++column) {
      for (int64_t i = 0; i < quarter; ++i) {
        const double omega = std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(quarter));
        const auto value = [&](int64_t at) { return positions[row][column][at].item<double>(); };
        EXPECT_CLOSE(value(i), std::sin(column * omega), 1e-6);
        EXPECT_CLOSE(value(quarter + i), std::cos(column * omega), 1e-6);
        EXPECT_CLOSE(value(2 * quarter + i), std::sin(row * omega), 1e-6);
        EXPECT_CLOSE(value(3 * quarter + i), std::cos(row * omega), 1e-6);
      }
    }
  }
}

TEST("a table of positions at another number of rows: itself where it fits, smooth where not, with a gradient") {
  const at::Tensor table = randn({16, 3}, 1);
  EXPECT(interpolate_table(table, 16).is_same(table));
  const at::Tensor constant = at::full({16, 3}, 2.5);
  EXPECT_CLOSE(interpolate_table(constant, 25), at::full({25, 3}, 2.5), 1e-6);
  // Twice the side: each new place is a mix of its neighbours, so the mean stays.
  const at::Tensor larger = interpolate_table(table, 64);
  EXPECT(larger.size(0) == 64 && larger.size(1) == 3);
  at::Tensor leaf = table.clone().set_requires_grad(true);
  interpolate_table(leaf, 64).sum().backward();
  EXPECT_CLOSE(leaf.grad().sum().item<double>(), 64.0 * 3.0, 1e-3);
  EXPECT_EQ(interpolate_table(table.to(at::kBFloat16), 64).scalar_type(), at::kBFloat16);
}

TEST("patches side by side are cut from the picture column by column of patches") {
  const int64_t size = 2;
  const at::Tensor image = at::arange(3 * 4 * 6, at::kFloat).view({3, 4, 6});
  PatchGrid grid;
  const at::Tensor patches = cut_patches(image.unsqueeze(0), size, 1, 1, grid);
  const at::Tensor row = patches_side_by_side(patches);
  EXPECT(row.sizes() == at::IntArrayRef({3, 2, 12}));
  for (int64_t i = 0; i < 6; ++i) {
    const at::Tensor patch = image.narrow(1, i / 3 * size, size).narrow(2, i % 3 * size, size);
    EXPECT_SAME(row.narrow(2, i * size, size), patch);
  }
}
