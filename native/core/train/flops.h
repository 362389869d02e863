// Arithmetic of a training step, for reports of how well a device is used. Products only; the vision tower is left out.
#pragma once

#include "core/models/model.h"
#include "core/train/batch.h"

namespace martlet {

class FlopCounter {
 public:
  // `full`: the language model's weights are trained too; `adapter` elements are trained beside them.
  FlopCounter(VisionLanguageModel& model, bool full, int64_t adapter);
  // Forward and backward of one packed batch, nothing counted twice for recompute.
  double training(const PackedBatch& batch) const;

 private:
  double per_token_ = 0;          // of the decoder's linears, forward and backward
  double per_encoder_token_ = 0;  // of an encoder-decoder's encoder
  double per_labelled_ = 0;       // of the head
  double per_pair_ = 0;           // of causal attention, for each pair of a row's tokens
  double per_encoder_pair_ = 0;   // of the encoder's, which is not causal
};

// Multiply-adds a second times two that one large 16-bit product reaches on the device, measured; 0 on the CPU.
double measured_peak_flops(c10::Device device);

}  // namespace martlet
