// Rows of tokens and pictures, and several of them packed into one sequence without padding.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/models/model.h"
#include "core/nn/attention.h"

namespace martlet {

constexpr int64_t kIgnored = -100;

struct Sample {
  std::vector<int64_t> input_ids;  // image tokens expanded
  std::vector<int64_t> labels;     // same length, or empty; kIgnored = not trained
  bool decoder_labels = false;  // of an encoder-decoder: of their own length, each for the decoder's place of its own
  std::vector<Picture> images;  // in the order of their places in input_ids
  std::string id;               // names the row in messages
};

struct PackedBatch {
  at::Tensor input_ids;                 // [T] int64; encoder-decoder: the encoder's
  at::Tensor positions;                 // [T] int64, or [axes, T]; they begin anew in each row
  std::vector<int64_t> next_positions;  // for each row, where the token after it would stand
  SequenceLengths rows;
  at::Tensor image_rows;  // [image tokens] int64: where image features go
  std::vector<Picture> images;
  // Encoder-decoder: the start token and all labels but the last, row by row; [D] int64.
  at::Tensor decoder_ids;
  SequenceLengths decoder_rows;
  // The loss is taken where the next token of the same row is labelled.
  at::Tensor predict_rows;  // [N] int64: rows of the decoder's states
  at::Tensor targets;       // [N] int64
  int64_t tokens = 0;       // of input_ids
  int64_t labelled = 0;
};

// Number of labelled tokens that have a token before them to be predicted from.
int64_t count_labelled(const Sample& sample);

PackedBatch pack(const std::vector<const Sample*>& samples, const VisionLanguageModel& model, at::Device device);

// What the decoder starts from. `pass` points to the batch's rows.
struct DecoderInput {
  at::Tensor hidden;  // [T, hidden]: token embeddings with image features in their places
  DecoderPass pass;
};
// `cache` takes the features of pictures with a key.
DecoderInput embed(const VisionLanguageModel& model, const PackedBatch& batch, const ForwardOptions& options,
                   bool vision_needs_grad, FeatureCache* cache = nullptr);

}  // namespace martlet
