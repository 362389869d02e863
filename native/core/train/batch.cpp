#include "core/train/batch.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"

namespace martlet {

int64_t count_labelled(const Sample& sample) {
  int64_t count = 0;
  for (size_t i = 1; i < sample.labels.size(); ++i) count += sample.labels[i] != kIgnored;
  return count;
}

PackedBatch pack(const std::vector<const Sample*>& samples, const VisionLanguageModel& model, at::Device device) {
  const ModelInfo& info = model.info();
  PackedBatch batch;
  std::vector<int64_t> ids, image_rows, predict_rows, targets, lengths;
  std::vector<std::vector<int64_t>> positions;  // by axis
  for (const Sample* sample : samples) {
    const int64_t length = static_cast<int64_t>(sample->input_ids.size()), start = static_cast<int64_t>(ids.size());
    if (length == 0)
      fail(code::kConfig, "A row without tokens was given" + (sample->id.empty() ? "" : " (" + sample->id + ")") + ".");
    lengths.push_back(length);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t id = sample->input_ids[i];
      if (id < 0 || (id >= info.vocab_size && !info.is_placeholder(id))) {
        fail("ERR_MARTLET_TOKENIZER",
             "Token id " + std::to_string(id) + " is outside the model's vocabulary of " +
                 std::to_string(info.vocab_size) + (sample->id.empty() ? "" : " (" + sample->id + ")") +
                 ": the tokenizer and the weights are not of one model.",
             {{"tokenId", id}, {"vocabSize", info.vocab_size}, {"id", sample->id}});
      }
      // The place is overwritten by an image feature; id 0 keeps the look-up in range where the image token has no
      // embedding.
      if (info.is_placeholder(id)) image_rows.push_back(start + i);
      ids.push_back(info.is_placeholder(id) ? 0 : id);
    }
    const RowPositions row = model.positions(sample->input_ids, sample->images, sample->id);
    positions.resize(row.axes.size());
    for (size_t axis = 0; axis < row.axes.size(); ++axis)
      positions[axis].insert(positions[axis].end(), row.axes[axis].begin(), row.axes[axis].end());
    batch.next_positions.push_back(row.next);
    for (size_t i = 1; i < sample->labels.size(); ++i) {
      if (sample->labels[i] == kIgnored) continue;
      predict_rows.push_back(start + static_cast<int64_t>(i) - 1);
      targets.push_back(sample->labels[i]);
    }
    batch.images.insert(batch.images.end(), sample->images.begin(), sample->images.end());
  }
  const auto to_device = [&](const std::vector<int64_t>& values) { return at::tensor(values, at::kLong).to(device); };
  batch.input_ids = to_device(ids);
  if (positions.size() == 1) {
    batch.positions = to_device(positions[0]);
  } else {
    std::vector<at::Tensor> axes;
    for (const auto& axis : positions) axes.push_back(at::tensor(axis, at::kLong));
    batch.positions = at::stack(axes).to(device);
  }
  batch.image_rows = to_device(image_rows);
  batch.predict_rows = to_device(predict_rows);
  batch.targets = to_device(targets);
  batch.rows = SequenceLengths::from_lengths(lengths, device);
  batch.tokens = static_cast<int64_t>(ids.size());
  batch.labelled = static_cast<int64_t>(targets.size());
  return batch;
}

DecoderInput embed(const VisionLanguageModel& model, const PackedBatch& batch, const ForwardOptions& options,
                   bool vision_needs_grad) {
  DecoderInput out;
  out.hidden = model.decoder().embed(batch.input_ids);
  out.pass.rows = &batch.rows;
  out.pass.options = options;
  std::vector<Decoder::Row> rows;
  for (size_t i = 0; i + 1 < batch.rows.offsets.size(); ++i) {
    const int64_t tokens = batch.rows.offsets[i + 1] - batch.rows.offsets[i];
    rows.push_back({tokens, batch.next_positions[i], options.training ? 0 : tokens});
  }
  model.decoder().place(out.pass, batch.positions, rows, out.hidden.scalar_type());
  if (batch.images.empty()) {
    if (batch.image_rows.numel() > 0) {
      fail(code::kImage,
           "The text has " + std::to_string(batch.image_rows.numel()) + " image tokens but no picture was given.");
    }
    return out;
  }
  VisionFeatures features;
  {
    std::optional<at::NoGradGuard> frozen;
    if (!vision_needs_grad) frozen.emplace();
    features = model.image_features(batch.images, options);
  }
  if (features.tokens.size(0) != batch.image_rows.numel()) {
    fail(code::kImage,
         "The text has places for " + std::to_string(batch.image_rows.numel()) +
             " image features, but the pictures give " + std::to_string(features.tokens.size(0)) +
             ": the image tokens were not expanded for this model.",
         {{"places", batch.image_rows.numel()}, {"features", features.tokens.size(0)}});
  }
  out.hidden = out.hidden.index_copy(0, batch.image_rows, features.tokens);
  out.pass.image_rows = batch.image_rows;
  out.pass.deepstack = std::move(features.deepstack);
  return out;
}

}  // namespace martlet
