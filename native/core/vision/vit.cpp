#include "core/vision/vit.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace martlet {

VitEmbeddings::PatchEmbedding::PatchEmbedding(const VitConfig& c) {
  register_parameter(weight, "weight", {c.hidden_size, c.num_channels * c.patch_size * c.patch_size});
}

VitEmbeddings::VitEmbeddings(const VitConfig& config)
    : position_embedding(config.patches() + 1, config.hidden_size), config_(config), patch_embedding_(config) {
  register_parameter(class_embedding, "class_embedding", {config.hidden_size});
  register_module(patch_embedding_, "patch_embedding");
  register_module(position_embedding, "position_embedding");
}

at::Tensor VitEmbeddings::forward(const at::Tensor& pixels) const {
  const int64_t n = pixels.size(0), p = config_.patch_size, grid = config_.image_size / p;
  // [N, C, gh, p, gw, p] → [N, gh · gw, C · p · p]: the order of a convolution kernel's elements.
  const at::Tensor flat = pixels.view({n, config_.num_channels, grid, p, grid, p})
                              .permute({0, 2, 4, 1, 3, 5})
                              .reshape({n * grid * grid, config_.num_channels * p * p});
  const at::Tensor patches =
      at::linear(flat, patch_embedding_.weight.value).view({n, grid * grid, config_.hidden_size});
  const at::Tensor cls = class_embedding.value.expand({n, 1, config_.hidden_size});
  return at::cat({cls, patches}, 1) + position_embedding.weight.value;
}

VitLayer::Attention::Attention(const VitConfig& c)
    : q_proj(c.hidden_size, c.hidden_size, true),
      k_proj(c.hidden_size, c.hidden_size, true),
      v_proj(c.hidden_size, c.hidden_size, true),
      out_proj(c.hidden_size, c.hidden_size, true),
      num_heads(c.num_heads),
      head_dim(c.hidden_size / c.num_heads) {
  register_module(k_proj, "k_proj");
  register_module(v_proj, "v_proj");
  register_module(q_proj, "q_proj");
  register_module(out_proj, "out_proj");
}

at::Tensor VitLayer::Attention::forward(const at::Tensor& x, const SequenceLengths& rows,
                                        DropoutSource* dropout) const {
  const auto heads = [&](const Linear& proj) {
    return proj.forward(x, dropout).view({x.size(0), num_heads, head_dim});
  };
  const at::Tensor mixed = packed_attention(heads(q_proj), heads(k_proj), heads(v_proj), rows, /*causal=*/false);
  return out_proj.forward(mixed.reshape(x.sizes()), dropout);
}

VitLayer::Mlp::Mlp(const VitConfig& c)
    : fc1(c.hidden_size, c.intermediate_size, true),
      fc2(c.intermediate_size, c.hidden_size, true),
      activation(c.activation) {
  register_module(fc1, "fc1");
  register_module(fc2, "fc2");
}

at::Tensor VitLayer::Mlp::forward(const at::Tensor& x, DropoutSource* dropout) const {
  const at::Tensor product =
      run_cheap([act = activation](const std::vector<at::Tensor>& in) { return activate(in[0], act); },
                {fc1.forward(x, dropout)});
  return fc2.forward(product, dropout);
}

VitLayer::VitLayer(const VitConfig& c)
    : self_attn_(c), mlp_(c), layer_norm1_(c.hidden_size, c.norm_eps), layer_norm2_(c.hidden_size, c.norm_eps) {
  register_module(self_attn_, "self_attn");
  register_module(layer_norm1_, "layer_norm1");
  register_module(mlp_, "mlp");
  register_module(layer_norm2_, "layer_norm2");
}

at::Tensor VitLayer::forward(const at::Tensor& x, const SequenceLengths& rows, DropoutSource* dropout) const {
  const at::Tensor h = x + self_attn_.forward(run_norm(layer_norm1_, x), rows, dropout);
  return h + mlp_.forward(run_norm(layer_norm2_, h), dropout);
}

Vit::Encoder::Encoder(const VitConfig& config) {
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers.push_back(std::make_unique<VitLayer>(config));
    register_module(*layers.back(), "layers." + std::to_string(i));
  }
}

Vit::Vit(const VitConfig& config)
    : config_(config), embeddings_(config), pre_layrnorm_(config.hidden_size, config.norm_eps), encoder_(config) {
  register_module(embeddings_, "embeddings");
  register_module(pre_layrnorm_, "pre_layrnorm");
  register_module(encoder_, "encoder");
}

std::vector<at::Tensor> Vit::forward(const at::Tensor& pixels, const std::vector<int64_t>& taps,
                                     const ForwardOptions& options) const {
  const int64_t n = pixels.size(0);
  const SequenceLengths rows =
      SequenceLengths::from_lengths(std::vector<int64_t>(n, 1 + config_.patches()), pixels.device());
  at::Tensor x = pre_layrnorm_.forward(embeddings_.forward(pixels)).view({rows.total(), config_.hidden_size});
  std::vector<at::Tensor> outputs(taps.size());
  const int64_t last = *std::max_element(taps.begin(), taps.end());
  for (int64_t i = 0; i <= last; ++i) {
    for (size_t t = 0; t < taps.size(); ++t) {
      if (taps[t] == i) outputs[t] = x;
    }
    if (i == last) break;
    const VitLayer& layer = *encoder_.layers[i];
    // `rows` and `dropout` outlive the backward pass only if they are captured by value.
    x = run_layer(
        [&layer, rows, dropout = options.dropout](const at::Tensor& h) { return layer.forward(h, rows, dropout); }, x,
        options);
  }
  return outputs;
}

}  // namespace martlet
