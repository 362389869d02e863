// Decoded pictures → what a vision tower takes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "core/vision/feature_cache.h"
#include "core/vision/patch_grid.h"

namespace martlet {

// See ImagePlan in lib/native/binding.ts.
struct ImagePlan {
  struct Size {
    int64_t height = 0, width = 0;
  };
  struct Box {
    int64_t top = 0, left = 0, height = 0, width = 0;
  };
  struct Patches {
    int64_t size = 0, temporal = 0, merge = 0;
    bool side_by_side = false;  // how `prepare` shows them; the network takes them alike
  };
  std::optional<Size> resize;
  std::optional<Box> crop;
  bool pillow = false;  // else as torchvision on uint8
  double rescale = 1.0 / 255;
  std::array<double, 3> mean{}, std{};
  std::optional<Patches> patches;
};

// A picture or a video, resized and cropped.
struct Picture {
  // What a vision tower takes, float32 on `device`: `pixels`, or made of `bytes`, which are what travels to a GPU.
  at::Tensor on(at::Device device) const;

  // [3, H, W]; or [grid.patches(), elements of a patch] in merge-block order. Undefined where there are bytes.
  at::Tensor pixels;
  PatchGrid grid;      // of patches
  bool video = false;  // its features go to video tokens
  // Seconds between two temporal patches of a video.
  double seconds_per_grid = 1.0;
  at::Tensor bytes;                                 // [frames, 3, H, W] uint8 on the CPU
  ImagePlan plan;                                   // of what is still to be done with them
  std::string key;                                  // of its features in the cache; empty: they are not kept
  std::shared_ptr<const PictureFeatures> features;  // from there: neither bytes nor pixels then
};

ImagePlan parse_image_plan(const nlohmann::json& plan);

// rgb: frames × height × width × 3 bytes. Several frames need a plan with patches.
Picture preprocess_image(const uint8_t* rgb, int64_t frames, int64_t width, int64_t height, const ImagePlan& plan);

// Bicubic as Pillow's Image.resize does it on 8-bit pictures, bit for bit (22-bit fixed-point coefficients, horizontal
// pass first). image: [H, W, 3] uint8.
at::Tensor resize_pillow_bicubic(const at::Tensor& image, int64_t height, int64_t width);
// The pixels inside `box` of the picture resized to `size`; the box lies inside it.
at::Tensor resize_pillow_bicubic(const at::Tensor& image, ImagePlan::Size size, ImagePlan::Box box);

}  // namespace martlet
