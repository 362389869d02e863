#include "core/projector/q_former.h"

#include <ATen/ATen.h>

namespace martlet {
namespace {

enum Place : int64_t { kSelf, kCross, kFeedForward, kEmbedding, kWeights };  // kWeights + kSelf or kCross

}  // namespace

// With the linear, the sum and the norm after it.
class QFormer::Attention : public Module {
 public:
  Attention(const QFormerConfig& c, int64_t source_size)
      : query_(c.hidden_size, c.hidden_size, true),
        key_(source_size, c.hidden_size, true),
        value_(source_size, c.hidden_size, true),
        dense_(c.hidden_size, c.hidden_size, true),
        norm_(c.hidden_size, c.norm_eps),
        head_dim_(c.hidden_size / c.num_heads),
        dropout_(c.dropout),
        attention_dropout_(c.attention_dropout) {
    register_module(query_, "attention.query");
    register_module(key_, "attention.key");
    register_module(value_, "attention.value");
    register_module(dense_, "output.dense");
    register_module(norm_, "output.LayerNorm");
  }

  at::Tensor forward(const at::Tensor& x, const at::Tensor& source, const SequenceLengths& rows,
                     const SequenceLengths& source_rows, DropoutSource* dropout, int64_t layer, Place place) const {
    const auto heads = [&](const Linear& linear, const at::Tensor& states) {
      return linear.forward(states, dropout).view({states.size(0), -1, head_dim_});
    };
    AttentionExtras extras;
    extras.dropout = {attention_dropout_, ModelDropout::kProjector, layer, kWeights + place};
    extras.source = dropout;
    const at::Tensor mixed = packed_attention(heads(query_, x), heads(key_, source), heads(value_, source), rows,
                                              source_rows, /*causal=*/false, extras);
    const at::Tensor y = dense_.forward(mixed.reshape(x.sizes()), dropout);
    return norm_.forward(ModelDropout{dropout_, ModelDropout::kProjector, layer, place}.forward(y, dropout) + x);
  }

 private:
  Linear query_, key_, value_, dense_;
  LayerNorm norm_;
  int64_t head_dim_;
  double dropout_, attention_dropout_;
};

class QFormer::Layer : public Module {
 public:
  Layer(const QFormerConfig& c, int64_t index)
      : index_(index),
        attention_(c, c.hidden_size),
        mlp_({c.hidden_size, c.intermediate_size, c.hidden_size}, c.activation, true, "", ""),
        norm_(c.hidden_size, c.norm_eps),
        dropout_(c.dropout) {
    register_module(attention_, "attention");
    if (index % c.cross_attention_frequency == 0)
      register_module(crossattention_.emplace(c, c.vision_size), "crossattention");
    register_module(mlp_.first, "intermediate_query.dense");
    register_module(mlp_.second, "output_query.dense");
    register_module(norm_, "output_query.LayerNorm");
  }

  at::Tensor forward(const at::Tensor& x, const at::Tensor& patches, const SequenceLengths& rows,
                     const SequenceLengths& patch_rows, DropoutSource* dropout) const {
    at::Tensor h = attention_.forward(x, x, rows, rows, dropout, index_, kSelf);
    if (crossattention_) h = crossattention_->forward(h, patches, rows, patch_rows, dropout, index_, kCross);
    const ModelDropout drop = {dropout_, ModelDropout::kProjector, index_, kFeedForward};
    return norm_.forward(drop.forward(mlp_.forward(h, dropout), dropout) + h);
  }

 private:
  int64_t index_;
  Attention attention_;
  std::optional<Attention> crossattention_;
  Mlp mlp_;  // its linears are the layer's own modules
  LayerNorm norm_;
  double dropout_;
};

QFormer::QFormer(const QFormerConfig& config) : config_(config), layernorm_(config.hidden_size, config.norm_eps) {
  register_module(layernorm_, "layernorm");
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers_.push_back(std::make_unique<Layer>(config, i));
    register_module(*layers_.back(), "encoder.layer." + std::to_string(i));
  }
}

QFormer::~QFormer() = default;

at::Tensor QFormer::forward(const at::Tensor& queries, const at::Tensor& patches, const SequenceLengths& rows,
                            const ForwardOptions& options) const {
  const at::ScalarType dtype = layernorm_.weight.value.scalar_type();
  const SequenceLengths query_rows =
      SequenceLengths::from_lengths(std::vector<int64_t>(rows.rows(), queries.size(0)), patches.device());
  const at::Tensor begin = layernorm_.forward(queries.to(dtype)).repeat({rows.rows(), 1}), seen = patches.to(dtype);
  at::Tensor x = ModelDropout{config_.dropout, ModelDropout::kProjector, 0, kEmbedding}.forward(begin, options.dropout);
  for (const auto& layer : layers_) {
    x = run_layer(
        [layer = layer.get(), query_rows, rows, dropout = options.dropout](const at::Tensor& h, const at::Tensor& p) {
          return layer->forward(h, p, query_rows, rows, dropout);
        },
        x, seen, options);
  }
  return x;
}

}  // namespace martlet
