// A perceiver: learned queries attend to the patches of each picture, so that every picture gives as many tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/nn/attention.h"
#include "core/nn/linear.h"
#include "core/nn/norm.h"

namespace martlet {

struct ResamplerConfig {
  int64_t queries = 0;
  int64_t embed_dim = 0;
  int64_t vision_dim = 0;
  int64_t num_heads = 0;
  double norm_eps = 1e-6;
  // Qwen-VL (visual.py): one stored table of positions, added to the queries as it is and to the keys interpolated.
  // Else MiniCPM-V (resampler.py): computed positions, added to the keys only; a last norm and matrix are its own.
  bool position_table = false;
};

class Resampler : public Module {
 public:
  explicit Resampler(const ResamplerConfig& config);
  // x: [T, vision_dim], the pictures of `rows` one after the other → [pictures · queries, embed_dim]. positions:
  // [T, embed_dim] for the keys; undefined where the table is stored (pictures are squares of one size then).
  at::Tensor forward(const at::Tensor& x, const SequenceLengths& rows, const at::Tensor& positions,
                     DropoutSource* dropout) const;
  const ResamplerConfig& config() const { return config_; }

 private:
  // torch.nn.MultiheadAttention's names: q, k and v are one matrix that is no linear layer.
  class Attention : public Module {
   public:
    explicit Attention(const ResamplerConfig& config);
    Parameter in_proj_weight, in_proj_bias;
    Linear out_proj;
  };

  ResamplerConfig config_;
  Parameter query_, pos_embed_, proj_;
  Linear kv_proj_;
  Attention attn_;
  LayerNorm ln_q_, ln_kv_;
  std::optional<LayerNorm> ln_post_;
};

}  // namespace martlet
