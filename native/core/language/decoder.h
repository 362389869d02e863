// Decoder(cfg): the pre-norm transformer of the Llama line and of OPT, over packed rows. Names are those of
// transformers' LlamaModel.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/language/language_model.h"
#include "core/nn/mlp.h"
#include "core/nn/norm.h"

namespace martlet {

struct DecoderNames {
  std::string embed_tokens = "embed_tokens", embed_positions = "embed_positions", layers = "layers", norm = "norm";
  std::string input_norm = "input_layernorm", post_attention_norm = "post_attention_layernorm";
  std::string attention = "self_attn", fused_qkv = "qkv_proj", attention_out = "o_proj";
  GatedMlpNames mlp;
};

// How a model reads prompts longer than those it was trained on (Qwen, 2023). At inference only.
struct LongContext {
  int64_t trained_length = 0;
  // Rotary base · α^(d/(d−2)) with α = 2^(⌈log₂(length / trained_length)⌉ + 1) − 1, at least 1, of the prompt's length;
  // what is generated after it keeps α.
  bool dynamic_ntk = false;
  // Queries · log(position) / log(trained_length) from there on, positions counted from 1.
  bool log_scale = false;
};

struct DecoderConfig : TextConfig {
  NormType norm = NormType::kRms;
  double rope_theta = 10000.0;
  // Positions on several axes (m-rope): the axis that each of the head_dim/2 frequencies turns with. Empty: one axis.
  std::vector<int64_t> rope_axis;
  bool rope_float32 = false;  // the rotation itself in float32
  std::optional<LongContext> long_context;
  // Positions are learned, not rotated: position p has row p + this of a table of max_positions + this rows.
  std::optional<int64_t> position_offset;
  bool fused_qkv = false;  // one linear, rows [q, k, v][heads][d]
  bool qkv_bias = false;
  bool output_bias = false;
  bool qk_norm = false;  // RMS norm over each head of q and k, before the rotation
  bool mlp_bias = false;
  // fc1, this, fc2, which are the layer's own modules; absent: the MLP gated by silu.
  std::optional<Activation> plain_mlp;
  double dropout = 0, attention_dropout = 0;  // of what attention and MLP give; of the attention's weights
  DecoderNames names;
};

class DecoderAttention : public Module {
 public:
  explicit DecoderAttention(const DecoderConfig& config);
  at::Tensor forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const;
  std::vector<std::unique_ptr<Linear>> qkv;  // one fused, or q_proj, k_proj, v_proj
  Linear o_proj;
  std::optional<RmsNorm> q_norm, k_norm;

 private:
  int64_t num_heads_, num_kv_heads_, head_dim_;
  double dropout_;
};

class DecoderLayer : public Module {
 public:
  explicit DecoderLayer(const DecoderConfig& config);
  at::Tensor forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const;
  DecoderAttention self_attn;
  std::unique_ptr<FeedForward> mlp;
  std::unique_ptr<Norm> input_layernorm, post_attention_layernorm;

 private:
  double dropout_;
};

class Decoder : public LanguageModel {
 public:
  explicit Decoder(const DecoderConfig& config);

  const DecoderConfig& config() const override { return config_; }
  void place(DecoderPass& pass, const at::Tensor& positions, const std::vector<Row>& rows,
             at::ScalarType dtype) const override;
  at::Tensor forward(at::Tensor hidden, const DecoderPass& pass) const override;
  void stack_weights() override;
  void refresh_pairs() override;
  at::Tensor head_input(const at::Tensor& states, const ForwardOptions&) const override {
    return norm->forward(states);
  }
  std::optional<DecodeForm> decode_form(at::ScalarType dtype) const override;

  std::optional<Embedding> embed_positions;
  std::vector<std::unique_ptr<DecoderLayer>> layers;
  std::unique_ptr<Norm> norm;

 private:
  DecoderConfig config_;
};

}  // namespace martlet
