#include "core/projector/resampler.h"

#include <ATen/ATen.h>

#include "core/vision/patch_grid.h"

namespace martlet {

Resampler::Attention::Attention(const ResamplerConfig& c) : out_proj(c.embed_dim, c.embed_dim, true) {
  register_parameter(in_proj_weight, "in_proj_weight", {3 * c.embed_dim, c.embed_dim});
  register_parameter(in_proj_bias, "in_proj_bias", {3 * c.embed_dim});
  register_module(out_proj, "out_proj");
}

Resampler::Resampler(const ResamplerConfig& c)
    : config_(c),
      kv_proj_(c.vision_dim, c.embed_dim, false),
      attn_(c),
      ln_q_(c.embed_dim, c.norm_eps),
      ln_kv_(c.embed_dim, c.norm_eps) {
  register_parameter(query_, "query", {c.queries, c.embed_dim});
  if (c.position_table) {
    register_parameter(pos_embed_, "pos_embed", {c.queries, c.embed_dim});
    pos_embed_.fixed = true;
  }
  // Without it the original has no projection at all.
  if (c.vision_dim != c.embed_dim) register_module(kv_proj_, "kv_proj");
  register_module(attn_, "attn");
  register_module(ln_q_, "ln_q");
  register_module(ln_kv_, "ln_kv");
  if (c.position_table) return;
  register_module(ln_post_.emplace(c.embed_dim, c.norm_eps), "ln_post");
  register_parameter(proj_, "proj", {c.embed_dim, c.embed_dim});
}

at::Tensor Resampler::forward(const at::Tensor& x, const SequenceLengths& rows, const at::Tensor& positions,
                              DropoutSource* dropout) const {
  const int64_t pictures = rows.rows(), dim = config_.embed_dim;
  const at::Tensor values = ln_kv_.forward(config_.vision_dim == config_.embed_dim ? x : kv_proj_.forward(x, dropout));
  at::Tensor queries = ln_q_.forward(query_.value), keys;
  if (config_.position_table) {
    queries = queries + pos_embed_.value;
    const at::Tensor table = interpolate_table(pos_embed_.value, rows.max_length);
    keys = (values.view({pictures, -1, dim}) + table).flatten(0, 1);
  } else {
    keys = values + positions.to(values.scalar_type());
  }
  const std::vector<at::Tensor> weights = attn_.in_proj_weight.value.chunk(3),
                                biases = attn_.in_proj_bias.value.chunk(3);
  const auto heads = [&](const at::Tensor& states, size_t i) {
    return at::linear(states, weights[i], biases[i]).view({states.size(0), config_.num_heads, -1});
  };
  // The queries are the same for every picture.
  const at::Tensor q = heads(queries, 0).repeat({pictures, 1, 1});
  const SequenceLengths q_rows =
      SequenceLengths::from_lengths(std::vector<int64_t>(pictures, config_.queries), x.device());
  const at::Tensor mixed = packed_attention(q, heads(keys, 1), heads(values, 2), q_rows, rows, /*causal=*/false);
  const at::Tensor out = attn_.out_proj.forward(mixed.reshape({-1, dim}), dropout);
  return ln_post_ ? at::matmul(ln_post_->forward(out), proj_.value) : out;
}

}  // namespace martlet
