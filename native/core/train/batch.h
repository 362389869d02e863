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
  std::vector<at::Tensor> images;  // [3, H, W] float32 on the CPU, preprocessed
  std::string id;                  // names the row in messages
};

struct PackedBatch {
  at::Tensor input_ids;  // [T] int64
  at::Tensor positions;  // [T] int64, from 0 in each row
  SequenceLengths rows;
  at::Tensor image_rows;  // [image tokens] int64: where image features go
  std::vector<at::Tensor> images;
  // The loss is taken where the next token of the same row is labelled.
  at::Tensor predict_rows;  // [N] int64: rows of the hidden states
  at::Tensor targets;       // [N] int64
  int64_t tokens = 0;
  int64_t labelled = 0;
};

// Number of labelled tokens that have a token before them to be predicted from.
int64_t count_labelled(const Sample& sample);

PackedBatch pack(const std::vector<const Sample*>& samples, const VisionLanguageModel& model, at::Device device);

// Token embeddings with image features in their places: [T, hidden].
at::Tensor embed(const VisionLanguageModel& model, const PackedBatch& batch, const ForwardOptions& options,
                 bool vision_needs_grad);

}  // namespace martlet
