#include "core/models/qwen_vl_common/model.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "core/base/error.h"
#include "core/vision/patch_grid.h"

namespace martlet::qwen_vl_common {
namespace {

constexpr const char* kText = "model.language_model.";
constexpr const char* kVision = "model.visual.";

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

class QwenVl : public VisionLanguageModel {
 public:
  QwenVl(Config config, bool own_head)
      : config_(std::move(config)), visual_(config_.vision), merger_(config_.merger), language_model_(config_.text) {
    register_module(visual_, "model.visual");
    register_module(merger_, "model.visual.merger");
    for (size_t i = 0; i < config_.deepstack_layers.size(); ++i) {
      deepstack_mergers_.push_back(std::make_unique<PatchMerger>(config_.deepstack_merger));
      register_module(*deepstack_mergers_.back(), "model.visual.deepstack_merger_list." + std::to_string(i));
    }
    register_module(language_model_, "model.language_model");
    if (own_head) {
      lm_head_.emplace(config_.text.hidden_size, config_.text.vocab_size, false);
      register_module(*lm_head_, "lm_head");
    }
  }

  const ModelInfo& info() const override { return config_.info; }

  Part part_of(const std::string& path) const override {
    if (starts_with(path, "model.visual.merger") || starts_with(path, "model.visual.deepstack_merger_list"))
      return Part::kProjector;
    return starts_with(path, kVision) ? Part::kVision : Part::kLanguage;
  }

  bool is_default_target(const std::string& path) const override { return starts_with(path, kText); }

  VisionFeatures image_features(const std::vector<Picture>& pictures, const ForwardOptions& options) const override {
    const int64_t merge = config_.merger.merge;
    const at::TensorOptions target = visual_.options();
    std::vector<PatchGrid> grids;
    std::vector<at::Tensor> pixels;
    for (const Picture& picture : pictures) {
      grids.push_back(picture.grid);
      pixels.push_back(checked(picture.on(target.device()), picture.grid).to(target));
    }
    // Reordered on the device, where a copy of all patches costs little.
    at::Tensor patches = at::cat(pixels), coordinates = patch_coordinates(grids, merge);
    VitLayout layout;
    layout.rows = SequenceLengths::from_lengths(frame_lengths(grids), target.device());
    at::Tensor token_order;  // on the CPU
    if (config_.window > 0) {
      // Patches go through the tower window by window; the merged tokens are put back.
      const WindowOrder order = window_order(grids, merge, config_.window);
      layout.windows = SequenceLengths::from_lengths(order.lengths, target.device());
      token_order = at::tensor(order.tokens, at::kLong);
      const at::Tensor patch_order =
          (token_order.unsqueeze(1) * (merge * merge) + at::arange(merge * merge, at::kLong)).flatten();
      patches = patches.index_select(0, patch_order.to(target.device()));
      coordinates = coordinates.index_select(1, patch_order);
    }
    layout.rotary =
        axial_rotary_table(coordinates.to(target.device()), config_.vision.hidden_size / config_.vision.num_heads,
                           config_.vision_rope_theta);
    if (config_.vision.positions == VitConfig::Positions::kSampledTable) {
      const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(config_.vision.position_rows)));
      const SampledTable table = sample_table(grids, merge, side);
      layout.position_index = table.index.to(target.device());
      layout.position_weight = table.weight.to(target.device());
    }

    std::vector<int64_t> taps;
    for (const int64_t layer : config_.deepstack_layers) taps.push_back(layer + 1);
    taps.push_back(config_.vision.num_layers);
    const std::vector<at::Tensor> states = visual_.forward(patches, layout, taps, options);
    VisionFeatures out;
    out.tokens = merger_.forward(states.back(), options.dropout);
    if (token_order.defined()) out.tokens = out.tokens.index_select(0, token_order.argsort().to(target.device()));
    for (size_t i = 0; i < deepstack_mergers_.size(); ++i)
      out.deepstack.push_back(deepstack_mergers_[i]->forward(states[i], options.dropout));
    return out;
  }

  // transformers' get_rope_index: text counts all three axes up by one; a picture's tokens stand at (time, row, column)
  // from where it begins, and the text goes on behind its longer side.
  RowPositions positions(const std::vector<int64_t>& ids, const std::vector<Picture>& pictures,
                         const std::string& id) const override {
    struct Block {
      PatchGrid grid;
      const Picture* picture;
    };
    std::vector<Block> blocks;
    for (const Picture& picture : pictures) {
      const bool apart = config_.frames_apart && picture.video;
      const PatchGrid grid = {apart ? 1 : picture.grid.t, picture.grid.h, picture.grid.w};
      blocks.insert(blocks.end(), apart ? picture.grid.t : 1, {grid, &picture});
    }
    const std::string where = id.empty() ? "The row" : "The row " + id;
    const int64_t length = static_cast<int64_t>(ids.size()), merge = config_.merger.merge;
    RowPositions out;
    out.axes.resize(3);
    for (auto& axis : out.axes) axis.reserve(ids.size());
    const auto put = [&](int64_t time, int64_t row, int64_t column) {
      const std::array<int64_t, 3> place = {time, row, column};
      for (size_t axis = 0; axis < 3; ++axis) {
        out.axes[axis].push_back(place[axis]);
        out.next = std::max(out.next, place[axis] + 1);
      }
    };
    size_t next_block = 0;
    int64_t position = 0;
    for (int64_t i = 0; i < length;) {
      if (!config_.info.is_placeholder(ids[i])) {
        put(position, position, position);
        ++position;
        ++i;
        continue;
      }
      const bool video = ids[i] == config_.info.video_token_id;
      int64_t run = 0;
      while (i + run < length && ids[i + run] == ids[i]) ++run;
      if (next_block == blocks.size()) {
        fail(code::kImage,
             where + " has " + std::to_string(run) + (video ? " video" : " image") + " tokens at position " +
                 std::to_string(i) + " for which no picture is left (it has " + std::to_string(pictures.size()) + ").",
             {{"id", id}, {"position", i}, {"tokens", run}, {"pictures", pictures.size()}});
      }
      const auto& [grid, picture] = blocks[next_block++];
      const int64_t tokens = grid.patches() / (merge * merge);
      if (picture->video != video) {
        fail(code::kImage,
             where + " has " + (video ? "video" : "image") + " tokens at position " + std::to_string(i) +
                 ", but what comes next in it is " + (video ? "a picture." : "a video."),
             {{"id", id}, {"position", i}});
      }
      if (run < tokens) {
        fail(code::kImage,
             where + " has places for " + std::to_string(run) + " features at position " + std::to_string(i) +
                 ", but the " + (video ? "video" : "picture") + " there gives " + std::to_string(tokens) +
                 ": the tokens were not expanded for this model.",
             {{"id", id}, {"position", i}, {"places", run}, {"features", tokens}});
      }
      // Seconds are cut to whole ones, as in the original.
      const int64_t step = video && config_.tokens_per_second > 0
                               ? config_.tokens_per_second * static_cast<int64_t>(picture->seconds_per_grid)
                               : 1;
      const int64_t rows = grid.h / merge, columns = grid.w / merge;
      for (int64_t t = 0; t < grid.t; ++t) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t column = 0; column < columns; ++column)
            put(position + t * step, position + row, position + column);
        }
      }
      position += std::max(rows, columns);
      i += tokens;
    }
    if (next_block < blocks.size()) {
      fail(code::kImage,
           where + " has " + std::to_string(pictures.size()) + " picture(s), but places for fewer: of " +
               std::to_string(blocks.size()) + " block(s) of image tokens it has " + std::to_string(next_block) + ".",
           {{"id", id}, {"pictures", pictures.size()}, {"blocks", blocks.size()}, {"found", next_block}});
    }
    return out;
  }

  int64_t feature_tokens(const Picture& picture) const override {
    return picture.grid.patches() / (config_.merger.merge * config_.merger.merge);
  }

  const LanguageModel& language_model() const override { return language_model_; }
  const at::Tensor& head_weight() const override {
    return lm_head_ ? lm_head_->weight.value : language_model_.embed_tokens.weight.value;
  }

 private:
  const at::Tensor& checked(const at::Tensor& pixels, const PatchGrid& grid) const {
    const int64_t merge = config_.merger.merge;
    if (pixels.dim() == 2 && pixels.size(1) == config_.vision.patch_elements && grid.patches() > 0 &&
        grid.patches() == pixels.size(0) && grid.h % merge == 0 && grid.w % merge == 0)
      return pixels;
    fail(code::kImage, "The processor made a picture of shape " + nlohmann::json(pixels.sizes().vec()).dump() +
                           ", but the vision tower takes patches of " + std::to_string(config_.vision.patch_elements) +
                           " numbers in blocks of " + std::to_string(merge) + "×" + std::to_string(merge) +
                           ": preprocessor_config.json and config.json are not of one model.");
  }

  Config config_;
  Vit visual_;
  PatchMerger merger_;
  std::vector<std::unique_ptr<PatchMerger>> deepstack_mergers_;
  Decoder language_model_;
  std::optional<Linear> lm_head_;
};

}  // namespace

std::string canonical_key(const std::string& key) {
  static const std::vector<std::pair<std::string, std::string>> prefixes = {
      {kVision, kVision},   {kText, kText},
      {"visual.", kVision}, {"language_model.", kText},  // a base model saved without its head
      {"model.", kText},
  };
  for (const auto& [from, to] : prefixes) {
    if (starts_with(key, from)) return to + key.substr(from.size());
  }
  return key;
}

bool is_unused_key(const nlohmann::json&, const std::string& canonical) {
  return canonical.find(".inv_freq") != std::string::npos;  // a buffer that old versions saved
}

std::unique_ptr<VisionLanguageModel> create(Config config, const WeightSource& stored) {
  const bool own_head = has_own_head(config.text, config.info, stored);
  return std::make_unique<QwenVl>(std::move(config), own_head);
}

}  // namespace martlet::qwen_vl_common
