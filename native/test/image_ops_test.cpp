#include "core/vision/image_ops.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "check.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

// [height, width, 3] uint8; the same formula made the pictures behind Pillow's values below.
at::Tensor picture(int64_t width, int64_t height) {
  at::Tensor out = at::empty({height, width, 3}, at::kByte);
  auto pixels = out.accessor<uint8_t, 3>();
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < 3; ++c) {
        pixels[y][x][c] = static_cast<uint8_t>((x * 37 + y * 91 + c * 53 + x * y * 11 + x * x * c * 7) % 256);
      }
    }
  }
  return out;
}

// Waves between 48 and 208, so that nothing is clamped between the two passes of a resize.
at::Tensor smooth_picture(int64_t width, int64_t height) {
  at::Tensor out = at::empty({height, width, 3}, at::kByte);
  auto pixels = out.accessor<uint8_t, 3>();
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < 3; ++c) {
        const double wave = std::sin(0.5 * static_cast<double>(x) + 0.3 * static_cast<double>(y * (c + 1)));
        pixels[y][x][c] = static_cast<uint8_t>(std::lround(128 + 80 * wave));
      }
    }
  }
  return out;
}

at::Tensor preprocess(const at::Tensor& image, const ImagePlan& plan) {
  return preprocess_image(image.const_data_ptr<uint8_t>(), 1, image.size(1), image.size(0), plan).on(at::kCPU);
}

// mean 0, std 1 and no rescaling: pixel values as they are.
ImagePlan raw_plan(bool pillow) {
  ImagePlan plan;
  plan.pillow = pillow;
  plan.rescale = 1.0;
  plan.std = {1, 1, 1};
  return plan;
}

at::Tensor channels_first(const at::Tensor& image) { return image.permute({2, 0, 1}).to(at::kFloat); }

// Keys' cubic with a = -0.5.
double cubic(double t) {
  t = std::abs(t);
  if (t < 1) return 1.5 * t * t * t - 2.5 * t * t + 1;
  return t < 2 ? -0.5 * t * t * t + 2.5 * t * t - 4 * t + 2 : 0;
}

// The weights of one axis in float64; the filter widens by the scale when it shrinks.
at::Tensor bicubic_matrix(int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out), width = std::max(scale, 1.0);
  at::Tensor matrix = at::zeros({out, in}, at::kDouble);
  auto weights = matrix.accessor<double, 2>();
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      weights[i][j] = cubic((static_cast<double>(j) + 0.5 - (static_cast<double>(i) + 0.5) * scale) / width);
    }
  }
  return matrix / matrix.sum(1, true);
}

// image: [height, width, 3] → [3, height, width], not rounded, clamped to what a pixel holds.
at::Tensor plain_bicubic(const at::Tensor& image, int64_t height, int64_t width) {
  const at::Tensor planes = image.permute({2, 0, 1}).to(at::kDouble);
  const at::Tensor lines = at::matmul(planes, bicubic_matrix(image.size(1), width).t());
  return at::matmul(bicubic_matrix(image.size(0), height), lines).clamp(0, 255);
}

}  // namespace

TEST("Pillow's bicubic, bit for bit: pictures that Pillow 13.0 resized") {
  const auto expected = [](std::vector<int64_t> pixels, int64_t width, int64_t height) {
    return at::tensor(pixels, at::kLong).to(at::kByte).view({height, width, 3});
  };
  const at::Tensor down =
      expected({86, 119, 114, 135, 127, 152, 125, 122, 129, 130, 135, 114, 141, 148, 144, 129, 137, 134}, 3, 2);
  const at::Tensor up =
      expected({0,   42, 92,  1,   55, 114, 21,  80,  154, 32,  93,  174, 26,  76,  149, 36, 93,  136, 60, 128,
                108, 72, 145, 100, 87, 139, 214, 101, 155, 157, 129, 188, 43,  143, 204, 0,  149, 216, 97, 166,
                186, 87, 198, 125, 69, 214, 94,  65,  184, 255, 12,  201, 199, 39,  237, 76, 94,  254, 15, 119},
               4, 5);
  const at::Tensor mixed =
      expected({0,   50,  109, 42,  116, 211, 88,  220, 143, 149, 87,  194, 33,  94,  133, 87,  122, 132, 150, 146,
                157, 113, 126, 164, 98,  164, 156, 156, 124, 25,  226, 49,  174, 69,  178, 128, 170, 189, 83,  165,
                85,  101, 128, 135, 146, 121, 134, 172, 211, 197, 32,  164, 59,  164, 55,  203, 126, 160, 98,  205},
               4, 5);
  EXPECT_SAME(resize_pillow_bicubic(picture(6, 4), 2, 3), down);
  EXPECT_SAME(resize_pillow_bicubic(picture(2, 3), 5, 4), up);
  EXPECT_SAME(resize_pillow_bicubic(picture(5, 3), 5, 4), mixed);
}

TEST("both backends are the bicubic formula, to the rounding of two passes") {
  struct Sizes {
    int64_t in_width, in_height, out_width, out_height;
  };
  for (const bool pillow : {true, false}) {
    for (const Sizes& s : {Sizes{40, 24, 20, 12}, {9, 7, 20, 23}, {31, 8, 17, 19}, {64, 3, 5, 3}}) {
      const at::Tensor image = smooth_picture(s.in_width, s.in_height);
      ImagePlan plan = raw_plan(pillow);
      plan.resize = {s.out_height, s.out_width};
      EXPECT_CLOSE(preprocess(image, plan), plain_bicubic(image, s.out_height, s.out_width), 1.25);
    }
  }
}

TEST("a picture of one colour stays that colour at every size") {
  for (const bool pillow : {true, false}) {
    for (const int64_t value : {0, 1, 127, 254, 255}) {
      const at::Tensor image = at::full({5, 7, 3}, value, at::kByte);
      // libtorch's kernel has an assertion that 1×1 fails, so one side is larger.
      for (const ImagePlan::Size& size : {ImagePlan::Size{2, 3}, {10, 14}, {1, 2}, {33, 7}}) {
        ImagePlan plan = raw_plan(pillow);
        plan.resize = size;
        EXPECT_SAME(preprocess(image, plan), at::full({3, size.height, size.width}, value, at::kFloat));
      }
    }
  }
}

TEST("a picture that has the size already is left as it is") {
  const at::Tensor image = picture(9, 6);
  EXPECT_SAME(resize_pillow_bicubic(image, 6, 9), image);
  for (const bool pillow : {true, false}) {
    ImagePlan plan = raw_plan(pillow);
    plan.resize = {6, 9};
    EXPECT_SAME(preprocess(image, plan), channels_first(image));
  }
}

TEST("halving a row: the pixels beside an edge") {
  // 0 0 0 0 255 255 255 255 to 4 pixels. The second output pixel is centred at 3.0; the white pixels are 1.5, 2.5 and
  // 3.5 away, 0.75, 1.25 and 1.75 in units of the widened filter. Black ones lie at 0.25 … 1.25 on the other side and
  // at 0.25 on this one; none is at 1.75, since the row begins at 0.5 − 3.0 = −2.5.
  at::Tensor image = at::zeros({1, 8, 3}, at::kByte);
  image.narrow(1, 4, 4).fill_(255);
  const double white = cubic(0.75) + cubic(1.25) + cubic(1.75);
  const double black = 2 * cubic(0.25) + cubic(0.75) + cubic(1.25);
  const double left = 255 * white / (white + black);
  for (const bool pillow : {true, false}) {
    ImagePlan plan = raw_plan(pillow);
    plan.resize = {1, 4};
    const at::Tensor out = preprocess(image, plan);
    EXPECT_CLOSE(out[0][0][1].item<double>(), left, 0.51);
    EXPECT_CLOSE(out[0][0][2].item<double>(), 255 - left, 0.51);
    EXPECT_SAME(out[0], out[2]);
  }
}

TEST("a crop takes its box; what lies outside the picture is black") {
  const at::Tensor image = picture(6, 4), planes = channels_first(image);
  for (const bool pillow : {true, false}) {
    ImagePlan plan = raw_plan(pillow);
    plan.crop = {1, 2, 2, 3};
    EXPECT_SAME(preprocess(image, plan), planes.narrow(1, 1, 2).narrow(2, 2, 3));
    plan.crop = {-1, -2, 6, 10};
    const at::Tensor padded = preprocess(image, plan);
    EXPECT_SAME(padded.narrow(1, 1, 4).narrow(2, 2, 6), planes);
    EXPECT_EQ(padded.sum().item<double>(), planes.sum().item<double>());
    plan.crop = {100, 100, 2, 2};
    EXPECT_SAME(preprocess(image, plan), at::zeros({3, 2, 2}, at::kFloat));
  }
}

TEST("resize comes before crop") {
  const at::Tensor image = picture(8, 8);
  ImagePlan plan = raw_plan(true);
  plan.resize = {4, 4};
  plan.crop = {1, 1, 2, 2};
  const at::Tensor resized = channels_first(resize_pillow_bicubic(image, 4, 4));
  EXPECT_SAME(preprocess(image, plan), resized.narrow(1, 1, 2).narrow(2, 1, 2));
}

TEST("normalising: (pixel · rescale − mean) / std for each channel") {
  const at::Tensor image = picture(5, 4);
  for (const bool pillow : {true, false}) {
    ImagePlan plan = raw_plan(pillow);
    plan.rescale = 1.0 / 255;
    plan.mean = {0.48, 0.45, 0.4};
    plan.std = {0.26, 0.27, 0.28};
    const at::Tensor out = preprocess(image, plan);
    for (int64_t c = 0; c < 3; ++c) {
      EXPECT_CLOSE(out[c], (image.select(2, c).to(at::kDouble) / 255 - plan.mean[c]) / plan.std[c], 1e-5);
    }
  }
}

TEST("a plan is read from JSON; sides out of range are ERR_MARTLET_IMAGE") {
  const json good = {{"resize", {{"height", 3}, {"width", 5}, {"backend", "pillow"}}},
                     {"crop", {{"top", 1}, {"left", 2}, {"height", 3}, {"width", 4}}},
                     {"rescale", 0.5},
                     {"mean", {0.1, 0.2, 0.3}},
                     {"std", {0.4, 0.5, 0.6}}};
  const ImagePlan plan = parse_image_plan(good);
  EXPECT(plan.pillow && plan.resize->height == 3 && plan.resize->width == 5);
  EXPECT(plan.crop->top == 1 && plan.crop->left == 2 && plan.crop->height == 3 && plan.crop->width == 4);
  EXPECT(plan.rescale == 0.5 && plan.mean[2] == 0.3 && plan.std[0] == 0.4);
  for (const char* section : {"resize", "crop"}) {
    for (const int64_t side : {int64_t{0}, int64_t{-3}, int64_t{1} << 20}) {
      json bad = good;
      bad[section]["width"] = side;
      EXPECT_THROWS_CODE(code::kImage, parse_image_plan(bad));
    }
  }
  EXPECT_THROWS_CODE(code::kImage, preprocess_image(nullptr, 1, 0, 4, raw_plan(true)));
}

TEST("a crop of a resized picture has the bits of the whole resized picture there") {
  const at::Tensor image = picture(37, 23);
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{50, 61}, {11, 9}, {23, 61}, {50, 37}, {23, 37}}) {
    const at::Tensor whole = resize_pillow_bicubic(image, height, width);
    for (const ImagePlan::Box& box : {ImagePlan::Box{0, 0, height, width}, ImagePlan::Box{0, 0, 1, 1},
                                      ImagePlan::Box{height - 1, width - 1, 1, 1}, ImagePlan::Box{3, 2, 5, 6}}) {
      const at::Tensor part = resize_pillow_bicubic(image, {height, width}, box);
      EXPECT_SAME(part, whole.narrow(0, box.top, box.height).narrow(1, box.left, box.width));
    }
  }
}
