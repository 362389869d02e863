#include "core/vision/image_ops.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "core/base/error.h"

namespace martlet {
namespace {

using nlohmann::json;

constexpr int64_t kMaxSide = 1 << 15;

void check_side(int64_t side) {
  if (side < 1 || side > kMaxSide)
    fail(code::kImage, "A picture side of " + std::to_string(side) + " pixels is out of range.");
}

// Pillow's ImagingResample for 8 bits a channel (libImaging/Resample.c): weights of the source pixels of each output
// pixel.
struct Weights {
  struct Span {
    int64_t first = 0, count = 0;
  };
  std::vector<Span> spans;
  std::vector<int32_t> fixed;  // [out, stride], 22 fractional bits
  int64_t stride = 0;
};

constexpr int kPrecisionBits = 32 - 8 - 2;

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Of the output pixels [begin, begin + size) of `out`.
Weights bicubic_weights(int64_t in, int64_t out, int64_t begin, int64_t size) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double filter_scale = std::max(scale, 1.0);
  const double support = 2.0 * filter_scale;
  Weights weights;
  weights.stride = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  weights.spans.resize(size);
  weights.fixed.assign(size * weights.stride, 0);
  std::vector<double> row(weights.stride);
  for (int64_t i = 0; i < size; ++i) {
    const double center = (static_cast<double>(begin + i) + 0.5) * scale;
    // C's truncation towards zero, as in the original.
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t count = std::min<int64_t>(in, static_cast<int64_t>(center + support + 0.5)) - first;
    double total = 0;
    for (int64_t j = 0; j < count; ++j) {
      row[j] = bicubic((static_cast<double>(j + first) - center + 0.5) * (1.0 / filter_scale));
      total += row[j];
    }
    for (int64_t j = 0; j < count; ++j) {
      const double w = (total != 0 ? row[j] / total : row[j]) * (1 << kPrecisionBits);
      weights.fixed[i * weights.stride + j] = static_cast<int32_t>(w < 0 ? w - 0.5 : w + 0.5);
    }
    weights.spans[i] = {first, count};
  }
  return weights;
}

// One pass along `axis_out` positions; `step` is the distance between source pixels of that axis, `lines` independent
// lines.
void resample_pass(const uint8_t* source, uint8_t* target, const Weights& weights, int64_t lines, int64_t source_line,
                   int64_t target_line, int64_t source_step, int64_t target_step) {
  const int64_t out = static_cast<int64_t>(weights.spans.size());
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < out; ++i) {
      const auto [first, count] = weights.spans[i];
      const int32_t* w = weights.fixed.data() + i * weights.stride;
      for (int c = 0; c < 3; ++c) {
        int32_t sum = 1 << (kPrecisionBits - 1);
        for (int64_t j = 0; j < count; ++j) sum += source[line * source_line + (first + j) * source_step + c] * w[j];
        target[line * target_line + i * target_step + c] =
            static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
      }
    }
  }
}

at::Tensor channel_values(const std::array<double, 3>& values) {
  return at::tensor({values[0], values[1], values[2]}, at::kFloat).view({3, 1, 1});
}

}  // namespace

ImagePlan parse_image_plan(const json& value) {
  ImagePlan plan;
  if (value.contains("resize")) {
    const json& resize = value["resize"];
    plan.resize = {resize.at("height").get<int64_t>(), resize.at("width").get<int64_t>()};
    plan.pillow = resize.at("backend") == "pillow";
    check_side(plan.resize->height);
    check_side(plan.resize->width);
  }
  if (value.contains("crop")) {
    const json& crop = value["crop"];
    plan.crop = {crop.at("top").get<int64_t>(), crop.at("left").get<int64_t>(), crop.at("height").get<int64_t>(),
                 crop.at("width").get<int64_t>()};
    check_side(plan.crop->height);
    check_side(plan.crop->width);
  }
  if (value.contains("patches")) {
    const json& patches = value["patches"];
    plan.patches = {patches.at("size").get<int64_t>(), patches.at("temporal").get<int64_t>(),
                    patches.at("merge").get<int64_t>(), patches.value("sideBySide", false)};
  }
  plan.rescale = value.at("rescale").get<double>();
  plan.mean = value.at("mean").get<std::array<double, 3>>();
  plan.std = value.at("std").get<std::array<double, 3>>();
  return plan;
}

at::Tensor resize_pillow_bicubic(const at::Tensor& image, int64_t height, int64_t width) {
  return resize_pillow_bicubic(image, {height, width}, {0, 0, height, width});
}

at::Tensor resize_pillow_bicubic(const at::Tensor& image, ImagePlan::Size size, ImagePlan::Box box) {
  const int64_t in_h = image.size(0), in_w = image.size(1);
  // Rows that the second pass reads.
  std::optional<Weights> down;
  int64_t first = box.top, rows = box.height;
  if (size.height != in_h) {
    down = bicubic_weights(in_h, size.height, box.top, box.height);
    first = down->spans.front().first;
    rows = down->spans.back().first + down->spans.back().count - first;
    for (Weights::Span& span : down->spans) span.first -= first;
  }
  at::Tensor current = image.narrow(0, first, rows);
  if (size.width != in_w) {
    current = current.contiguous();
    at::Tensor out = at::empty({rows, box.width, 3}, at::kByte);
    resample_pass(current.const_data_ptr<uint8_t>(), out.mutable_data_ptr<uint8_t>(),
                  bicubic_weights(in_w, size.width, box.left, box.width), rows, in_w * 3, box.width * 3, 3, 3);
    current = out;
  } else {
    current = current.narrow(1, box.left, box.width).contiguous();
  }
  if (!down) return current;
  at::Tensor out = at::empty({box.height, box.width, 3}, at::kByte);
  resample_pass(current.const_data_ptr<uint8_t>(), out.mutable_data_ptr<uint8_t>(), *down, box.width, 3, 3,
                box.width * 3, box.width * 3);
  return out;
}

namespace {

// One frame, resized and cropped → [3, H, W] uint8.
at::Tensor resized_frame(const uint8_t* rgb, int64_t width, int64_t height, const ImagePlan& plan) {
  at::Tensor image = at::from_blob(const_cast<uint8_t*>(rgb), {height, width, 3}, at::kByte);  // read only
  bool cropped = false;
  if (plan.resize && plan.pillow) {
    const auto& [h, w] = *plan.resize;
    const ImagePlan::Box whole = {0, 0, h, w}, box = plan.crop.value_or(whole);
    // Only what a crop inside the picture keeps is computed: slices of one picture cost as much as the picture.
    cropped = box.top >= 0 && box.left >= 0 && box.height <= h - box.top && box.width <= w - box.left;
    image = resize_pillow_bicubic(image, *plan.resize, cropped ? box : whole);
  }
  image = image.permute({2, 0, 1});
  if (plan.resize && !plan.pillow && (plan.resize->height != height || plan.resize->width != width)) {
    image = at::_upsample_bicubic2d_aa(image.contiguous().unsqueeze(0), {plan.resize->height, plan.resize->width},
                                       /*align_corners=*/false)
                .squeeze(0);
  }
  if (plan.crop && !cropped) {
    const ImagePlan::Box& box = *plan.crop;
    const int64_t h = image.size(1), w = image.size(2);
    const int64_t top = std::clamp<int64_t>(box.top, 0, h), bottom = std::clamp<int64_t>(box.top + box.height, 0, h);
    const int64_t left = std::clamp<int64_t>(box.left, 0, w), right = std::clamp<int64_t>(box.left + box.width, 0, w);
    at::Tensor canvas = at::zeros({3, box.height, box.width}, at::kByte);
    if (bottom > top && right > left) {
      canvas.narrow(1, top - box.top, bottom - top)
          .narrow(2, left - box.left, right - left)
          .copy_(image.narrow(1, top, bottom - top).narrow(2, left, right - left));
    }
    image = canvas;
  }
  return image;
}

// Copied through pinned memory, which a GPU reads at its bus's full speed.
at::Tensor moved(const at::Tensor& x, at::Device device) {
  if (!device.is_cuda()) return x;
  const at::Tensor pinned = at::empty_strided(x.sizes(), x.strides(), x.options().pinned_memory(true)).copy_(x);
  return pinned.to(device, x.scalar_type(), /*non_blocking=*/true);
}

}  // namespace

at::Tensor Picture::on(at::Device device) const {
  if (pixels.defined()) return pixels.to(device);
  const at::Tensor image = moved(bytes, device).contiguous();
  const auto by_channel = [&](const std::array<double, 3>& values, double factor) {
    return moved(channel_values(values) * factor, device);
  };
  at::Tensor values;
  if (plan.pillow) {
    // The Pillow backend rescales in float64, rounds to float32, then normalises.
    const at::Tensor rescaled = (image.to(at::kDouble) * plan.rescale).to(at::kFloat);
    values = (rescaled - by_channel(plan.mean, 1)) / by_channel(plan.std, 1);
  } else {
    // The torchvision backend folds the rescaling into mean and std.
    const double fold = 1.0 / plan.rescale;
    values = image.to(at::kFloat).sub_(by_channel(plan.mean, fold)).div_(by_channel(plan.std, fold));
  }
  if (!plan.patches) return values[0];
  return cut_patches(values, plan.patches->size, plan.patches->temporal, plan.patches->merge);
}

Picture preprocess_image(const uint8_t* rgb, int64_t frames, int64_t width, int64_t height, const ImagePlan& plan) {
  check_side(width);
  check_side(height);
  if (frames < 1 || (frames > 1 && !plan.patches))
    fail(code::kImage, "A video of " + std::to_string(frames) + " frames cannot be given to this model.");
  std::vector<at::Tensor> images;
  for (int64_t i = 0; i < frames; ++i)
    images.push_back(resized_frame(rgb + i * height * width * 3, width, height, plan));
  Picture picture;
  picture.plan = plan;
  // A copy: what a picture that needs no resizing was made of is the caller's. A frame keeps its order of bytes.
  picture.bytes = frames == 1 ? images[0].clone().unsqueeze(0) : at::stack(images);
  if (plan.patches) {
    const ImagePlan::Patches& p = *plan.patches;
    picture.grid = patch_grid(picture.bytes, p.size, p.temporal, p.merge);
  }
  return picture;
}

}  // namespace martlet
