#include "core/vision/vit.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/vision/patch_grid.h"

namespace martlet {
namespace {

std::unique_ptr<FeedForward> make_mlp(const VitConfig& c) {
  if (c.gated_mlp) return std::make_unique<GatedMlp>(c.hidden_size, c.intermediate_size, /*bias=*/true);
  return std::make_unique<Mlp>(Mlp::Sizes{c.hidden_size, c.intermediate_size, c.hidden_size}, c.activation,
                               /*bias=*/true, c.names.fc1, c.names.fc2);
}

}  // namespace

VitLayer::Attention::Attention(const VitConfig& c)
    : out_(c.hidden_size, c.hidden_size, true),
      num_heads_(c.num_heads),
      head_dim_(c.hidden_size / c.num_heads),
      layout_(c.qkv) {
  if (c.qkv != VitConfig::Qkv::kSeparate) {
    qkv_.push_back(std::make_unique<Linear>(c.hidden_size, 3 * c.hidden_size, true));
    register_module(*qkv_[0], c.names.fused_qkv);
  } else {
    for (int i = 0; i < 3; ++i) qkv_.push_back(std::make_unique<Linear>(c.hidden_size, c.hidden_size, true));
    register_module(*qkv_[1], "k_proj");
    register_module(*qkv_[2], "v_proj");
    register_module(*qkv_[0], "q_proj");
  }
  register_module(out_, c.names.attention_out);
}

at::Tensor VitLayer::Attention::forward(const at::Tensor& x, const SequenceLengths& rows,
                                        const std::optional<RotaryTable>& rotary, DropoutSource* dropout) const {
  std::vector<at::Tensor> qkv;  // [T, heads, d] each
  if (layout_ == VitConfig::Qkv::kFused) {
    qkv = qkv_[0]->forward(x, dropout).view({x.size(0), 3, num_heads_, head_dim_}).unbind(1);
  } else if (layout_ == VitConfig::Qkv::kFusedByHead) {
    qkv = qkv_[0]->forward(x, dropout).view({x.size(0), num_heads_, 3, head_dim_}).unbind(2);
  } else {
    for (const auto& proj : qkv_) qkv.push_back(proj->forward(x, dropout).view({x.size(0), num_heads_, head_dim_}));
  }
  if (rotary) {
    for (int i = 0; i < 2; ++i) qkv[i] = apply_rotary(qkv[i], *rotary);
  }
  const at::Tensor mixed = packed_attention(qkv[0], qkv[1], qkv[2], rows, /*causal=*/false);
  return out_.forward(mixed.reshape(x.sizes()), dropout);
}

VitLayer::VitLayer(const VitConfig& c)
    : attention_(c),
      mlp_(make_mlp(c)),
      norm1_(make_norm(c.norm, c.hidden_size, c.norm_eps)),
      norm2_(make_norm(c.norm, c.hidden_size, c.norm_eps)) {
  register_module(attention_, c.names.attention);
  register_module(*norm1_, c.names.norm1);
  register_module(*mlp_, "mlp");
  register_module(*norm2_, c.names.norm2);
}

at::Tensor VitLayer::forward(const at::Tensor& x, const SequenceLengths& rows, const std::optional<RotaryTable>& rotary,
                             DropoutSource* dropout) const {
  const at::Tensor h = x + attention_.forward(run_norm(*norm1_, x), rows, rotary, dropout);
  return h + mlp_->forward(run_norm(*norm2_, h), dropout);
}

Vit::PatchEmbedding::PatchEmbedding(const VitConfig& c) {
  register_parameter(weight, "weight", {c.hidden_size, c.patch_elements});
  if (c.patch_bias) register_parameter(bias, "bias", {c.hidden_size});
}

Vit::Vit(const VitConfig& config) : config_(config), patch_embedding_(config) {
  const VitNames& names = config_.names;
  if (config_.class_token) register_parameter(class_embedding_, names.class_embedding, {config_.hidden_size});
  register_module(patch_embedding_, names.patch_embedding);
  if (config_.positions != VitConfig::Positions::kNone) {
    register_parameter(position_embedding_, names.position_embedding, {config_.position_rows, config_.hidden_size});
  }
  if (config_.embedding_norm) {
    embedding_norm_ = make_norm(config_.norm, config_.hidden_size, config_.norm_eps);
    register_module(*embedding_norm_, names.embedding_norm);
  }
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    layers_.push_back(std::make_unique<VitLayer>(config_));
    register_module(*layers_.back(), names.layers + "." + std::to_string(i));
  }
}

at::Tensor Vit::embed(const at::Tensor& patches, const VitLayout& layout) const {
  const auto bias = patch_embedding_.bias.value;
  at::Tensor x = at::linear(patches, patch_embedding_.weight.value,
                            bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
  const int64_t pictures = layout.rows.rows();
  if (config_.class_token) {
    const at::Tensor cls = class_embedding_.value.expand({pictures, 1, config_.hidden_size});
    x = at::cat({cls, x.view({pictures, -1, config_.hidden_size})}, 1).flatten(0, 1);
  }
  if (config_.positions == VitConfig::Positions::kTable) {
    x = (x.view({pictures, -1, config_.hidden_size}) + position_embedding_.value).flatten(0, 1);
  } else if (config_.positions == VitConfig::Positions::kInterpolatedTable) {
    const at::Tensor table = interpolate_table(position_embedding_.value, x.size(0) / pictures);
    x = (x.view({pictures, -1, config_.hidden_size}) + table).flatten(0, 1);
  } else if (config_.positions == VitConfig::Positions::kSampledTable) {
    // Weighted and summed in float32, then rounded, in every dtype (transformers 5).
    const at::Tensor rows = at::embedding(position_embedding_.value, layout.position_index);
    x = x + (rows * layout.position_weight.unsqueeze(-1)).sum(1).to(x.scalar_type());
  }
  return embedding_norm_ ? embedding_norm_->forward(x) : x;
}

std::vector<at::Tensor> Vit::forward(const at::Tensor& patches, const VitLayout& layout,
                                     const std::vector<int64_t>& taps, const ForwardOptions& options) const {
  at::Tensor x = embed(patches, layout);
  std::vector<at::Tensor> outputs(taps.size());
  const int64_t last = *std::max_element(taps.begin(), taps.end());
  const auto& full = config_.full_attention_layers;
  for (int64_t i = 0; i <= last; ++i) {
    for (size_t t = 0; t < taps.size(); ++t) {
      if (taps[t] == i) outputs[t] = x;
    }
    if (i == last) break;
    const VitLayer& layer = *layers_[i];
    const bool windowed = !full.empty() && std::find(full.begin(), full.end(), i) == full.end();
    // What the layer needs outlives the backward pass only if it is captured by value.
    SequenceLengths rows = windowed ? layout.windows : layout.rows;
    rows.recurring = options.training;
    x = run_layer([&layer, rows, rotary = layout.rotary,
                   dropout = options.dropout](const at::Tensor& h) { return layer.forward(h, rows, rotary, dropout); },
                  x, options);
  }
  return outputs;
}

}  // namespace martlet
