// Decoder(cfg): the pre-norm transformer of the Llama line, over packed rows. Names are those of transformers'
// LlamaModel.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/nn/attention.h"
#include "core/nn/checkpoint.h"
#include "core/nn/linear.h"
#include "core/nn/mlp.h"
#include "core/nn/norm.h"
#include "core/nn/rope.h"

namespace martlet {

struct DecoderNames {
  std::string embed_tokens = "embed_tokens", layers = "layers", norm = "norm";
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

struct DecoderConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_positions = 0;
  double norm_eps = 1e-6;
  double rope_theta = 10000.0;
  // Positions on several axes (m-rope): the axis that each of the head_dim/2 frequencies turns with. Empty: one axis.
  std::vector<int64_t> rope_axis;
  bool rope_float32 = false;  // the rotation itself in float32
  std::optional<LongContext> long_context;
  bool fused_qkv = false;  // one linear, rows [q, k, v][heads][d]
  bool qkv_bias = false;
  bool output_bias = false;
  bool qk_norm = false;  // RMS norm over each head of q and k, before the rotation
  bool mlp_bias = false;
  bool tie_word_embeddings = false;
  DecoderNames names;
};

// Keys and values of one row, for decoding. Storage grows by doubling.
class KvCache {
 public:
  explicit KvCache(int64_t num_layers) : layers_(num_layers) {}
  // Appends [n, kv_heads, d] at `length()` of layer `layer`; gives the whole of it back, [length + n, kv_heads, d].
  std::pair<at::Tensor, at::Tensor> append(int64_t layer, const at::Tensor& k, const at::Tensor& v);
  // Call once all layers have appended.
  void advance(int64_t n) { length_ += n; }
  int64_t length() const { return length_; }

 private:
  struct Layer {
    at::Tensor k, v;
  };
  std::vector<Layer> layers_;
  int64_t length_ = 0;
};

// What one pass over the layers needs besides the hidden states; made once a step.
struct DecoderPass {
  const SequenceLengths* rows = nullptr;
  RotaryTable rotary;
  at::Tensor query_scale;  // [T, 1, 1]; undefined: none
  // Deepstack: deepstack[k], [image tokens, hidden], is added at `image_rows` to what layer k gives.
  at::Tensor image_rows;
  std::vector<at::Tensor> deepstack;
  KvCache* cache = nullptr;  // inference only; with a non-empty cache the pass is one new position
  ForwardOptions options;
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
};

class DecoderLayer : public Module {
 public:
  explicit DecoderLayer(const DecoderConfig& config);
  at::Tensor forward(const at::Tensor& x, const DecoderPass& pass, int64_t layer) const;
  DecoderAttention self_attn;
  GatedMlp mlp;
  RmsNorm input_layernorm, post_attention_layernorm;
};

class Decoder : public Module {
 public:
  explicit Decoder(const DecoderConfig& config);

  // ids: [T] → [T, hidden]
  at::Tensor embed(const at::Tensor& ids) const { return embed_tokens.forward(ids); }
  // A packed row of a pass.
  struct Row {
    int64_t tokens = 0;
    int64_t end = 0;     // position after its last token
    int64_t prompt = 0;  // tokens that the model was given at first: `tokens`, unless it decodes. 0 = training
  };
  // Fills what `pass` holds of positions. positions: [T], or [axes, T] where there are several (alike on all of them:
  // [T] will do).
  void place(DecoderPass& pass, const at::Tensor& positions, const std::vector<Row>& rows, at::ScalarType dtype) const;
  // hidden: [T, hidden] → [T, hidden], before the final norm.
  at::Tensor forward(at::Tensor hidden, const DecoderPass& pass) const;

  const DecoderConfig& config() const { return config_; }

  Embedding embed_tokens;
  std::vector<std::unique_ptr<DecoderLayer>> layers;
  RmsNorm norm;

 private:
  DecoderConfig config_;
};

}  // namespace martlet
