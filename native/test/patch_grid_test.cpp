// Pictures of any size as sequences of patches: order, windows, sampled positions; and the merger at the end.
#include "core/vision/patch_grid.h"

#include <ATen/ATen.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/projector/patch_merger.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

using Values = std::vector<int64_t>;

at::Tensor rows_of(const at::Tensor& coordinates) { return coordinates[0]; }
at::Tensor columns_of(const at::Tensor& coordinates) { return coordinates[1]; }

}  // namespace

TEST("patches come in blocks of merge × merge, each as [channel, frame, row, column]") {
  // Value = 1000 · frame + 100 · channel + 10 · row + column.
  const auto axis = [](int64_t n, int64_t step, at::IntArrayRef shape) {
    return (at::arange(n, at::kFloat) * static_cast<double>(step)).view(shape);
  };
  const at::Tensor frames =
      axis(2, 1000, {2, 1, 1, 1}) + axis(3, 100, {1, 3, 1, 1}) + axis(4, 10, {1, 1, 4, 1}) + axis(8, 1, {1, 1, 1, 8});
  const PatchGrid grid = patch_grid(frames, 2, 2, 2);
  const at::Tensor patches = cut_patches(frames, 2, 2, 2);
  EXPECT_EQ(grid.t, 1);
  EXPECT_EQ(grid.h, 2);
  EXPECT_EQ(grid.w, 4);
  EXPECT_EQ(patches.size(0), 8);
  EXPECT_EQ(patches.size(1), 3 * 2 * 2 * 2);
  // The upper left pixel of each patch: two blocks of (row, column), row by row within a block.
  EXPECT_SAME(patches.select(1, 0), at::tensor({0, 2, 20, 22, 4, 6, 24, 26}, at::kFloat));
  EXPECT_SAME(patches[5].narrow(0, 0, 8), at::tensor({6, 7, 16, 17, 1006, 1007, 1016, 1017}, at::kFloat));
  EXPECT_SAME(patches[0].narrow(0, 8, 4), at::tensor({100, 101, 110, 111}, at::kFloat));
  const at::Tensor coordinates = patch_coordinates({grid}, 2);
  EXPECT_SAME(rows_of(coordinates), at::tensor({0, 0, 1, 1, 0, 0, 1, 1}, at::kLong));
  EXPECT_SAME(columns_of(coordinates), at::tensor({0, 1, 0, 1, 2, 3, 2, 3}, at::kLong));
}

TEST("a still picture is its own second frame; a last temporal patch that is not full repeats the last frame") {
  const at::Tensor frames = randn({3, 3, 4, 4}, 1);
  EXPECT_SAME(cut_patches(frames.narrow(0, 0, 1), 2, 2, 2),
              cut_patches(frames.narrow(0, 0, 1).expand({2, 3, 4, 4}), 2, 2, 2));
  EXPECT_EQ(patch_grid(frames.narrow(0, 0, 1), 2, 2, 2).t, 1);
  const at::Tensor three = cut_patches(frames, 2, 2, 2);
  EXPECT_EQ(patch_grid(frames, 2, 2, 2).t, 2);
  EXPECT_SAME(three.narrow(0, 4, 4), cut_patches(frames.narrow(0, 2, 1), 2, 2, 2));
  EXPECT_SAME(three.narrow(0, 0, 4), cut_patches(frames.narrow(0, 0, 2), 2, 2, 2));
}

TEST("a side that is no multiple of patch × merge is ERR_MARTLET_IMAGE with both numbers") {
  const Error error = EXPECT_THROWS_CODE(code::kImage, cut_patches(at::zeros({1, 3, 8, 6}), 2, 2, 2));
  EXPECT_CONTAINS(error.what(), "6×8");
  EXPECT_CONTAINS(error.what(), "multiple of 4");
}

TEST("windows: row by row, smaller ones at the edges") {
  // 5 × 6 tokens in windows of 4: 4×4, 4×2, 1×4, 1×2.
  const WindowOrder order = window_order({{1, 10, 12}}, 2, 4);
  EXPECT(order.lengths == (Values{64, 32, 16, 8}));
  EXPECT(order.tokens == (Values{0,  1, 2, 3,  6,  7,  8,  9,  12, 13, 14, 15, 18, 19, 20,
                                 21, 4, 5, 10, 11, 16, 17, 22, 23, 24, 25, 26, 27, 28, 29}));
}

TEST("windows that fill the picture leave no empty ones; frames and pictures have their own") {
  const WindowOrder whole = window_order({{1, 8, 16}}, 2, 4);
  EXPECT(whole.lengths == (Values{64, 64}));
  EXPECT(whole.tokens == (Values{0, 1, 2, 3, 8,  9,  10, 11, 16, 17, 18, 19, 24, 25, 26, 27,
                                 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}));
  const WindowOrder several = window_order({{2, 2, 2}, {1, 2, 4}}, 2, 4);
  EXPECT(several.lengths == (Values{4, 4, 8}));
  EXPECT(several.tokens == (Values{0, 1, 2, 3}));
  EXPECT(frame_lengths({{2, 2, 2}, {1, 2, 4}}) == (Values{4, 4, 8}));
}

TEST("sampled positions: bilinear with aligned corners, in merge-block order, for every frame") {
  // Columns 0, 2/3, 4/3, 2 of a table of 3 × 3; rows 0 and 2.
  const SampledTable table = sample_table({{2, 2, 4}}, 2, 3);
  EXPECT_EQ(table.index.size(0), 16);
  EXPECT_SAME(table.index.narrow(0, 0, 8), table.index.narrow(0, 8, 8));
  const at::Tensor values = at::arange(9, at::kFloat);  // 3 · row + column: bilinear sampling gives it back exactly
  const at::Tensor sampled = (values.index_select(0, table.index.flatten()).view({16, 4}) * table.weight).sum(1);
  const float a = 2.0f / 3, b = 4.0f / 3;
  EXPECT_CLOSE(sampled.narrow(0, 0, 8), at::tensor({0.f, a, 6.f, 6 + a, b, 2.f, 6 + b, 8.f}, at::kFloat), 1e-6);
  EXPECT_CLOSE(table.weight.sum(1), at::ones({16}), 1e-6);
  // A single row or column stands on the table's first.
  const SampledTable one = sample_table({{1, 1, 1}}, 1, 3);
  EXPECT_SAME(one.weight, at::tensor({1, 0, 0, 0}, at::kFloat).view({1, 4}));
  EXPECT_EQ(one.index[0][0].item<int64_t>(), 0);
}

TEST("a patch merger normalises each patch, or the merged row, before its two linears") {
  for (const bool after : {false, true}) {
    PatchMergerConfig config;
    config.vision_size = 6;
    config.text_size = 5;
    config.norm_after_merge = after;
    PatchMerger merger(config);
    uint64_t seed = 0;
    std::map<std::string, at::Tensor> weights;
    merger.visit_parameters(
        [&](const std::string& name, Parameter& p) { weights[name] = p.value = randn(p.shape, ++seed); });
    EXPECT_EQ(weights.at("ln_q.weight").numel(), after ? 24 : 6);
    const at::Tensor x = randn({8, 6}, 50);
    const at::Tensor rows = after ? x.view({2, 24}) : x;
    const at::Tensor normed =
        at::layer_norm(rows, {rows.size(1)}, weights.at("ln_q.weight"), weights.at("ln_q.bias"), 1e-6);
    const at::Tensor hidden =
        at::gelu(at::linear(normed.view({2, 24}), weights.at("mlp.0.weight"), weights.at("mlp.0.bias")));
    EXPECT_CLOSE(merger.forward(x, nullptr), at::linear(hidden, weights.at("mlp.2.weight"), weights.at("mlp.2.bias")),
                 1e-4);
  }
}

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
  const at::Tensor patches = cut_patches(image.unsqueeze(0), size, 1, 1);
  const at::Tensor row = patches_side_by_side(patches);
  EXPECT(row.sizes() == at::IntArrayRef({3, 2, 12}));
  for (int64_t i = 0; i < 6; ++i) {
    const at::Tensor patch = image.narrow(1, i / 3 * size, size).narrow(2, i % 3 * size, size);
    EXPECT_SAME(row.narrow(2, i * size, size), patch);
  }
}
