// What one decoding step of a language model consists of, for the fast path to read: its modules in their order. Null:
// the step does not have it.
#pragma once

#include <vector>

#include "core/nn/activation.h"
#include "core/nn/linear.h"
#include "core/nn/norm.h"

namespace martlet {

struct DecodeForm {
  struct Layer {
    const Norm *input_norm = nullptr, *mlp_norm = nullptr;
    std::vector<const Linear*> qkv;  // one fused, or q, k, v
    const Norm *q_norm = nullptr, *k_norm = nullptr;
    const Linear* out = nullptr;
    // Attention to what an encoder read, whose keys and values are in the cache.
    const Norm* cross_norm = nullptr;
    const Linear *cross_q = nullptr, *cross_out = nullptr;
    const Linear *gate = nullptr, *up = nullptr, *down = nullptr;
  };
  std::vector<Layer> layers;
  Activation activation = Activation::kSilu;  // of the gate, or of `up` where there is none
  double attention_scale = 1.0;
  // Added to the scores of self-attention by the distance of query and key, the last for all that are farther:
  // [heads, distances].
  at::Tensor distance_bias;
  const Embedding* learned_positions = nullptr;  // rows as DecoderPass::position_rows
  const Norm* final_norm = nullptr;
  double head_scale = 1.0;  // of what the final norm gives
};

}  // namespace martlet
