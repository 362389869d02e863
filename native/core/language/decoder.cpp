#include "core/language/decoder.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace martlet {

std::pair<at::Tensor, at::Tensor> KvCache::append(int64_t layer, const at::Tensor& k, const at::Tensor& v) {
  Layer& cache = layers_[layer];
  const int64_t needed = length_ + k.size(0);
  if (!cache.k.defined() || cache.k.size(0) < needed) {
    // 256 spare positions at first: most answers are short; then doubling.
    const int64_t capacity = cache.k.defined() ? std::max(needed, cache.k.size(0) * 2) : needed + 256;
    const auto grow = [&](const at::Tensor& old, const at::Tensor& like) {
      at::Tensor grown = at::empty({capacity, like.size(1), like.size(2)}, like.options());
      if (old.defined()) grown.narrow(0, 0, length_).copy_(old.narrow(0, 0, length_));
      return grown;
    };
    cache.k = grow(cache.k, k);
    cache.v = grow(cache.v, v);
  }
  cache.k.narrow(0, length_, k.size(0)).copy_(k);
  cache.v.narrow(0, length_, v.size(0)).copy_(v);
  return {cache.k.narrow(0, 0, needed), cache.v.narrow(0, 0, needed)};
}

DecoderAttention::DecoderAttention(const DecoderConfig& c)
    : q_proj(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias),
      k_proj(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias),
      v_proj(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias),
      o_proj(c.num_heads * c.head_dim, c.hidden_size, c.output_bias),
      num_heads_(c.num_heads),
      num_kv_heads_(c.num_kv_heads),
      head_dim_(c.head_dim) {
  register_module(q_proj, "q_proj");
  register_module(k_proj, "k_proj");
  register_module(v_proj, "v_proj");
  register_module(o_proj, "o_proj");
  if (!c.qk_norm) return;
  register_module(q_norm.emplace(c.head_dim, c.norm_eps), "q_norm");
  register_module(k_norm.emplace(c.head_dim, c.norm_eps), "k_norm");
}

at::Tensor DecoderAttention::forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const {
  const int64_t tokens = x.size(0);
  const auto rotated = [&](const Linear& proj, const std::optional<RmsNorm>& norm, int64_t heads) {
    const at::Tensor states = proj.forward(x, pass.options.dropout).view({tokens, heads, head_dim_});
    return apply_rotary(norm ? norm->forward(states) : states, pass.rotary);
  };
  const at::Tensor q = rotated(q_proj, q_norm, num_heads_), k = rotated(k_proj, k_norm, num_kv_heads_);
  const at::Tensor v = v_proj.forward(x, pass.options.dropout).view({tokens, num_kv_heads_, head_dim_});
  at::Tensor mixed;
  if (pass.cache != nullptr && pass.cache->length() > 0) {
    const auto [keys, values] = pass.cache->append(layer, k, v);
    mixed = decode_attention(q, keys, values);
  } else {
    if (pass.cache != nullptr) pass.cache->append(layer, k, v);
    mixed = packed_attention(q, k, v, *pass.rows, /*causal=*/true);
  }
  return o_proj.forward(mixed.reshape({tokens, num_heads_ * head_dim_}), pass.options.dropout);
}

DecoderLayer::DecoderLayer(const DecoderConfig& c)
    : self_attn(c),
      mlp(c.hidden_size, c.intermediate_size, c.mlp_bias),
      input_layernorm(c.hidden_size, c.norm_eps),
      post_attention_layernorm(c.hidden_size, c.norm_eps) {
  register_module(self_attn, "self_attn");
  register_module(mlp, "mlp");
  register_module(input_layernorm, "input_layernorm");
  register_module(post_attention_layernorm, "post_attention_layernorm");
}

at::Tensor DecoderLayer::forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const {
  const at::Tensor h = x + self_attn.forward(run_norm(input_layernorm, x), pass, layer);
  // With the sum in it: gradients of h add up in one order, whatever is run again.
  return run_mlp([this, dropout = pass.options.dropout](
                     const at::Tensor& y) { return y + mlp.forward(run_norm(post_attention_layernorm, y), dropout); },
                 h, pass.options);
}

Decoder::Decoder(const DecoderConfig& config)
    : embed_tokens(config.vocab_size, config.hidden_size), norm(config.hidden_size, config.norm_eps), config_(config) {
  register_module(embed_tokens, "embed_tokens");
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers.push_back(std::make_unique<DecoderLayer>(config));
    register_module(*layers.back(), "layers." + std::to_string(i));
  }
  register_module(norm, "norm");
}

RotaryTable Decoder::rotary(const at::Tensor& positions, at::ScalarType dtype) const {
  if (positions.dim() == 1) return rotary_table(positions, config_.head_dim, config_.rope_theta, dtype);
  return rotary_table(positions, config_.rope_axis, config_.head_dim, config_.rope_theta, dtype);
}

at::Tensor Decoder::forward(at::Tensor hidden, const DecoderPass& pass) const {
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const DecoderLayer& layer = *layers[i];
    hidden =
        run_layer([&layer, &pass, i](const at::Tensor& x) { return layer.forward(x, pass, i); }, hidden, pass.options);
    if (i < static_cast<int64_t>(pass.deepstack.size()))
      hidden = hidden.index_add(0, pass.image_rows, pass.deepstack[i]);
  }
  if (pass.cache != nullptr) pass.cache->advance(hidden.size(0));
  return hidden;
}

}  // namespace martlet
