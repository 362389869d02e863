#include "core/language/decoder.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/base/memory.h"
#include "core/language/frozen_layer.h"

namespace martlet {

DecoderAttention::DecoderAttention(const DecoderConfig& c)
    : o_proj(c.num_heads * c.head_dim, c.hidden_size, c.output_bias),
      num_heads_(c.num_heads),
      num_kv_heads_(c.num_kv_heads),
      head_dim_(c.head_dim),
      dropout_(c.attention_dropout) {
  if (c.fused_qkv) {
    const int64_t heads = c.num_heads + 2 * c.num_kv_heads;
    qkv.push_back(std::make_unique<Linear>(c.hidden_size, heads * c.head_dim, c.qkv_bias));
    register_module(*qkv[0], c.names.fused_qkv);
  } else {
    const auto add = [&](const char* name, int64_t heads) {
      qkv.push_back(std::make_unique<Linear>(c.hidden_size, heads * c.head_dim, c.qkv_bias));
      register_module(*qkv.back(), name);
    };
    add("q_proj", c.num_heads);
    add("k_proj", c.num_kv_heads);
    add("v_proj", c.num_kv_heads);
  }
  register_module(o_proj, c.names.attention_out);
  if (!c.qk_norm) return;
  register_module(q_norm.emplace(c.head_dim, c.norm_eps), "q_norm");
  register_module(k_norm.emplace(c.head_dim, c.norm_eps), "k_norm");
}

at::Tensor DecoderAttention::forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const {
  const int64_t tokens = x.size(0);
  std::vector<at::Tensor> states;  // [T, heads, d] each
  if (qkv.size() == 1) {
    states = qkv[0]
                 ->forward(x, pass.options.dropout)
                 .view({tokens, -1, head_dim_})
                 .split_with_sizes({num_heads_, num_kv_heads_, num_kv_heads_}, 1);
  } else {
    for (const auto& proj : qkv) states.push_back(proj->forward(x, pass.options.dropout).view({tokens, -1, head_dim_}));
  }
  const auto rotated = [&](const at::Tensor& heads, const std::optional<RmsNorm>& norm) {
    const at::Tensor x = norm ? norm->forward(heads) : heads;
    return pass.rotary.cos.defined() ? apply_rotary(x, pass.rotary) : x;
  };
  at::Tensor q = rotated(states[0], q_norm);
  const at::Tensor k = rotated(states[1], k_norm), &v = states[2];
  if (pass.query_scale.defined()) q = q * pass.query_scale;
  at::Tensor mixed;
  if (decodes(pass.caches)) {
    mixed = decode_attention(pass.caches, layer, q, k, v);
  } else {
    append_prompts(pass.caches, layer, k, v, *pass.rows);
    AttentionExtras extras;
    extras.dropout = {dropout_, ModelDropout::kDecoder, layer, 0};
    extras.source = pass.options.dropout;
    mixed = packed_attention(q, k, v, *pass.rows, /*causal=*/true, extras);
  }
  return o_proj.forward(mixed.reshape({tokens, num_heads_ * head_dim_}), pass.options.dropout);
}

DecoderLayer::DecoderLayer(const DecoderConfig& c)
    : self_attn(c),
      input_layernorm(make_norm(c.norm, c.hidden_size, c.norm_eps)),
      post_attention_layernorm(make_norm(c.norm, c.hidden_size, c.norm_eps)),
      dropout_(c.dropout) {
  register_module(self_attn, c.names.attention);
  if (c.plain_mlp) {
    auto plain = std::make_unique<Mlp>(Mlp::Sizes{c.hidden_size, c.intermediate_size, c.hidden_size}, *c.plain_mlp,
                                       c.mlp_bias, "fc1", "fc2");
    register_module(plain->first, "fc1");
    register_module(plain->second, "fc2");
    mlp = std::move(plain);
  } else {
    mlp = std::make_unique<GatedMlp>(c.hidden_size, c.intermediate_size, c.mlp_bias, c.names.mlp);
    register_module(*mlp, "mlp");
  }
  register_module(*input_layernorm, c.names.input_norm);
  register_module(*post_attention_layernorm, c.names.post_attention_norm);
}

at::Tensor DecoderLayer::forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const {
  DropoutSource* source = pass.options.dropout;
  const auto dropped = [this, source, layer](const at::Tensor& y, int64_t place) {
    return ModelDropout{dropout_, ModelDropout::kDecoder, layer, place}.forward(y, source);
  };
  const at::Tensor h = x + dropped(self_attn.forward(run_norm(*input_layernorm, x), pass, layer), 1);
  // With the sum in it: gradients of h add up in one order, whatever is run again.
  return run_mlp(
      [this, source, dropped](const at::Tensor& y) {
        return y + dropped(mlp->forward(run_norm(*post_attention_layernorm, y), source), 2);
      },
      h, pass.options);
}

Decoder::Decoder(const DecoderConfig& config)
    : LanguageModel(config.vocab_size, config.hidden_size),
      norm(make_norm(config.norm, config.hidden_size, config.norm_eps)),
      config_(config) {
  register_module(embed_tokens, config.names.embed_tokens);
  if (config.position_offset) {
    embed_positions.emplace(config.max_positions + *config.position_offset, config.hidden_size);
    register_module(*embed_positions, config.names.embed_positions);
  }
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers.push_back(std::make_unique<DecoderLayer>(config));
    register_module(*layers.back(), config.names.layers + "." + std::to_string(i));
  }
  register_module(*norm, config.names.norm);
}

namespace {

double rope_theta(const DecoderConfig& config, int64_t prompt) {
  if (!config.long_context || !config.long_context->dynamic_ntk || prompt == 0) return config.rope_theta;
  const double ratio = static_cast<double>(prompt) / static_cast<double>(config.long_context->trained_length);
  const double alpha = std::max(std::exp2(std::ceil(std::log(ratio) / std::log(2.0) + 1.0)) - 1.0, 1.0);
  const auto d = static_cast<double>(config.head_dim);
  return config.rope_theta * std::pow(alpha, d / (d - 2.0));
}

}  // namespace

void Decoder::place(DecoderPass& pass, const at::Tensor& positions, const std::vector<Row>& rows,
                    at::ScalarType dtype) const {
  if (config_.position_offset) {
    pass.position_rows = positions + *config_.position_offset;
    return;
  }
  const at::ScalarType table = config_.rope_float32 ? at::kFloat : dtype;
  if (positions.dim() > 1) {
    pass.rotary = rotary_table(positions, config_.rope_axis, config_.head_dim, config_.rope_theta, table);
    return;
  }
  std::vector<double> thetas;
  for (const Row& row : rows) thetas.push_back(rope_theta(config_, row.prompt));
  if (std::all_of(thetas.begin(), thetas.end(), [&](double theta) { return theta == thetas[0]; })) {
    pass.rotary = rotary_table(positions, config_.head_dim, thetas.at(0), table);
  } else {
    std::vector<at::Tensor> cos, sin;
    int64_t start = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      const at::Tensor own = positions.narrow(0, start, rows[i].tokens);
      const RotaryTable part = rotary_table(own, config_.head_dim, thetas[i], table);
      cos.push_back(part.cos);
      sin.push_back(part.sin);
      start += rows[i].tokens;
    }
    pass.rotary = {at::cat(cos), at::cat(sin)};
  }
  pass.query_scale = at::Tensor();
  if (!config_.long_context || !config_.long_context->log_scale) return;
  const int64_t trained = config_.long_context->trained_length;
  if (std::none_of(rows.begin(), rows.end(), [&](const Row& row) { return row.prompt > 0 && row.end > trained; }))
    return;
  const at::Tensor counted = positions.to(at::kDouble) + 1.0;
  pass.query_scale = at::where(counted > trained, counted.log() / std::log(static_cast<double>(trained)), 1.0)
                         .to(at::kFloat)
                         .to(dtype)
                         .view({-1, 1, 1});
}

void Decoder::stack_weights() {
  for (const auto& layer : layers) {
    stack_layer_weights(*layer, pair_form(embed_tokens.weight.device()));
    // What was stacked from is of another size: without this the allocator would hold it beside the stacks.
    empty_cache(embed_tokens.weight.device());
  }
}

std::optional<DecodeForm> Decoder::decode_form(at::ScalarType) const {
  DecodeForm form;
  for (const auto& layer : layers) {
    DecodeForm::Layer& own = form.layers.emplace_back();
    const DecoderAttention& attention = layer->self_attn;
    own.input_norm = layer->input_layernorm.get();
    for (const auto& linear : attention.qkv) own.qkv.push_back(linear.get());
    if (attention.q_norm) {
      own.q_norm = &*attention.q_norm;
      own.k_norm = &*attention.k_norm;
    }
    own.out = &attention.o_proj;
    own.mlp_norm = layer->post_attention_layernorm.get();
    if (config_.plain_mlp) {
      const auto& mlp = static_cast<const Mlp&>(*layer->mlp);
      own.up = &mlp.first;
      own.down = &mlp.second;
    } else {
      const auto& mlp = static_cast<const GatedMlp&>(*layer->mlp);
      own.gate = &mlp.gate_proj;
      own.up = &mlp.up_proj;
      own.down = &mlp.down_proj;
    }
  }
  form.activation = config_.plain_mlp.value_or(Activation::kSilu);
  form.attention_scale = 1.0 / std::sqrt(static_cast<double>(config_.head_dim));
  if (embed_positions) form.learned_positions = &*embed_positions;
  form.final_norm = norm.get();
  return form;
}

void Decoder::refresh_pairs() {
  for (const auto& layer : layers) refresh_layer_pairs(*layer);
}

at::Tensor Decoder::forward(at::Tensor hidden, const DecoderPass& pass) const {
  if (embed_positions) hidden = hidden + embed_positions->forward(pass.position_rows);
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const DecoderLayer& layer = *layers[i];
    if (const auto output = run_frozen_layer(layer, config_, hidden, pass)) {
      hidden = *output;
    } else {
      hidden = run_layer([&layer, &pass, i](const at::Tensor& x) { return layer.forward(x, pass, i); }, hidden,
                         pass.options);
    }
    if (i < static_cast<int64_t>(pass.deepstack.size()))
      hidden = hidden.index_add(0, pass.image_rows, pass.deepstack[i]);
  }
  advance(pass.caches, decodes(pass.caches) ? nullptr : pass.rows);
  return hidden;
}

}  // namespace martlet
