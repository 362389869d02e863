#include "core/train/batch.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/base/error.h"

namespace martlet {

int64_t count_labelled(const Sample& sample) {
  int64_t count = 0;
  for (size_t i = sample.decoder_labels ? 0 : 1; i < sample.labels.size(); ++i) count += sample.labels[i] != kIgnored;
  return count;
}

PackedBatch pack(const std::vector<const Sample*>& samples, const VisionLanguageModel& model, at::Device device) {
  const ModelInfo& info = model.info();
  PackedBatch batch;
  std::vector<int64_t> ids, image_rows, predict_rows, targets, lengths, decoder_ids, decoder_lengths;
  std::vector<std::vector<int64_t>> positions;  // by axis
  for (const Sample* sample : samples) {
    const int64_t length = static_cast<int64_t>(sample->input_ids.size()), start = static_cast<int64_t>(ids.size());
    if (length == 0)
      fail(code::kConfig, "A row without tokens was given" + (sample->id.empty() ? "" : " (" + sample->id + ")") + ".");
    lengths.push_back(length);
    const auto check = [&](int64_t id) {
      if (id >= 0 && id < info.vocab_size) return;
      fail("ERR_MARTLET_TOKENIZER",
           "Token id " + std::to_string(id) + " is outside the model's vocabulary of " +
               std::to_string(info.vocab_size) + (sample->id.empty() ? "" : " (" + sample->id + ")") +
               ": the tokenizer and the weights are not of one model.",
           {{"tokenId", id}, {"vocabSize", info.vocab_size}, {"id", sample->id}});
    };
    for (int64_t i = 0; i < length; ++i) {
      const int64_t id = sample->input_ids[i];
      if (id < 0 || !info.is_placeholder(id)) check(id);
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
    const std::vector<int64_t>& labels = sample->labels;
    // An encoder-decoder's label is predicted from its own place, since what the decoder is given lags behind by one.
    const int64_t lag = info.is_encoder_decoder() ? 0 : 1;
    const int64_t first = (lag == 0 ? static_cast<int64_t>(decoder_ids.size()) : start) - lag;
    for (size_t i = lag; i < labels.size(); ++i) {
      if (labels[i] == kIgnored) continue;
      check(labels[i]);
      predict_rows.push_back(first + static_cast<int64_t>(i));
      targets.push_back(labels[i]);
    }
    if (info.is_encoder_decoder()) {
      decoder_ids.push_back(info.decoder_start_id);
      // What is not trained is read as padding, which T5 begins with too.
      for (size_t i = 0; i + 1 < labels.size(); ++i)
        decoder_ids.push_back(labels[i] == kIgnored ? info.decoder_start_id : labels[i]);
      decoder_lengths.push_back(std::max<int64_t>(1, static_cast<int64_t>(labels.size())));
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
  if (info.is_encoder_decoder()) {
    batch.decoder_ids = to_device(decoder_ids);
    batch.decoder_rows = SequenceLengths::from_lengths(decoder_lengths, device);
  }
  batch.tokens = static_cast<int64_t>(ids.size());
  batch.labelled = static_cast<int64_t>(targets.size());
  return batch;
}

namespace {

// Each picture once, and those that the cache has not at all.
VisionFeatures cached_features(const VisionLanguageModel& model, const std::vector<Picture>& pictures,
                               const ForwardOptions& options, at::Device device, FeatureCache& cache) {
  std::vector<Picture> wanted;
  std::map<std::string, size_t> by_key;
  std::vector<size_t> source(pictures.size());  // in `wanted`
  for (size_t i = 0; i < pictures.size(); ++i) {
    const Picture& picture = pictures[i];
    if (picture.features != nullptr) continue;
    const auto known = picture.key.empty() ? by_key.end() : by_key.find(picture.key);
    source[i] = known == by_key.end() ? wanted.size() : known->second;
    if (known != by_key.end()) continue;
    if (!picture.key.empty()) by_key[picture.key] = wanted.size();
    wanted.push_back(picture);
  }
  std::vector<VisionFeatures> computed(wanted.size());
  if (!wanted.empty()) {
    const VisionFeatures all = model.image_features(wanted, options);
    int64_t begin = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const int64_t count = model.feature_tokens(wanted[i]);
      computed[i].tokens = all.tokens.narrow(0, begin, count);
      for (const at::Tensor& level : all.deepstack) computed[i].deepstack.push_back(level.narrow(0, begin, count));
      begin += count;
      if (!wanted[i].key.empty()) cache.put(wanted[i].key, wanted[i].grid, computed[i]);
    }
    if (wanted.size() == pictures.size()) return all;
  }
  std::vector<at::Tensor> tokens;
  std::vector<std::vector<at::Tensor>> deepstack;  // by level
  for (size_t i = 0; i < pictures.size(); ++i) {
    const bool kept = pictures[i].features != nullptr;
    const VisionFeatures& values = kept ? pictures[i].features->values : computed[source[i]];
    const auto here = [&](const at::Tensor& t) { return t.to(device, t.scalar_type(), /*non_blocking=*/true); };
    tokens.push_back(here(values.tokens));
    deepstack.resize(values.deepstack.size());
    for (size_t k = 0; k < values.deepstack.size(); ++k) deepstack[k].push_back(here(values.deepstack[k]));
  }
  VisionFeatures out = {at::cat(tokens), {}};
  for (const auto& level : deepstack) out.deepstack.push_back(at::cat(level));
  return out;
}

}  // namespace

DecoderInput embed(const VisionLanguageModel& model, const PackedBatch& batch, const ForwardOptions& options,
                   bool vision_needs_grad, FeatureCache* cache) {
  DecoderInput out;
  out.hidden = model.language_model().embed(batch.input_ids);
  out.pass.rows = &batch.rows;
  out.pass.decoder_ids = batch.decoder_ids;
  out.pass.decoder_rows = &batch.decoder_rows;
  out.pass.options = options;
  std::vector<LanguageModel::Row> rows;
  for (size_t i = 0; i + 1 < batch.rows.offsets.size(); ++i) {
    const int64_t tokens = batch.rows.offsets[i + 1] - batch.rows.offsets[i];
    rows.push_back({tokens, batch.next_positions[i], options.training ? 0 : tokens});
  }
  model.language_model().place(out.pass, batch.positions, rows, out.hidden.scalar_type());
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
    features = cache == nullptr ? model.image_features(batch.images, options)
                                : cached_features(model, batch.images, options, out.hidden.device(), *cache);
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
