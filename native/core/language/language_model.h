// What the trainer and the generator know of a language model: embeddings in, states for the head out. An
// encoder-decoder reads its input once and answers with its decoder; its callers need not know.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "core/language/decode_form.h"
#include "core/nn/attention.h"
#include "core/nn/checkpoint.h"
#include "core/nn/linear.h"
#include "core/nn/rope.h"

namespace martlet {

struct TextConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;      // of the decoder
  int64_t encoder_layers = 0;  // 0: a decoder alone
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_positions = 0;  // 0: no limit
  double norm_eps = 1e-6;
  bool tie_word_embeddings = false;
};

// Keys and values of one row, for decoding. Storage grows by doubling.
class KvCache {
 public:
  explicit KvCache(int64_t num_layers) : layers_(num_layers) {}
  // Appends [n, kv_heads, d] at `length()` of layer `layer`; gives the whole of it back, [length + n, kv_heads, d].
  std::pair<at::Tensor, at::Tensor> append(int64_t layer, const at::Tensor& k, const at::Tensor& v);
  // What layer `layer` holds: keys and values, [length, kv_heads, d] each.
  std::pair<at::Tensor, at::Tensor> stored(int64_t layer) const {
    return {layers_[layer].k.narrow(0, 0, length_), layers_[layer].v.narrow(0, 0, length_)};
  }
  // Call once all layers have appended.
  void advance(int64_t n) { length_ += n; }
  int64_t length() const { return length_; }

  // Keys and values of what the encoder read, for cross-attention: made in the first pass, [read, heads, d].
  struct Memory {
    at::Tensor k, v;
  };
  Memory& memory(int64_t layer) { return layers_[layer].memory; }
  const Memory& memory(int64_t layer) const { return layers_[layer].memory; }

 private:
  struct Layer {
    at::Tensor k, v;
    Memory memory;
  };
  std::vector<Layer> layers_;
  int64_t length_ = 0;
};

// The caches of a pass's rows are all empty (it reads the prompts), or none is (it is one new position of each row).
using RowCaches = std::vector<KvCache*>;
inline bool decodes(const RowCaches& caches) { return !caches.empty() && caches[0]->length() > 0; }
// Each row's part of k and v, [T, kv_heads, d], into its empty cache.
void append_prompts(const RowCaches& caches, int64_t layer, const at::Tensor& k, const at::Tensor& v,
                    const SequenceLengths& rows);
// Appends the new positions' k and v, [rows, kv_heads, d], and attends to what is then there.
// q: [rows, heads, d] → [rows, heads, d].
at::Tensor decode_attention(const RowCaches& caches, int64_t layer, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const AttentionExtras& extras = {});
// Each row's part of the keys and values of what the encoder read, [read, heads, d].
void keep_memory(const RowCaches& caches, int64_t layer, const KvCache::Memory& memory, const SequenceLengths& rows);
at::Tensor decode_cross_attention(const RowCaches& caches, int64_t layer, const at::Tensor& q,
                                  const AttentionExtras& extras);
// Once all layers have appended. rows: of the prompts; null where it decodes.
void advance(const RowCaches& caches, const SequenceLengths* rows);

// What one pass over the layers needs besides the hidden states; made once a step.
struct DecoderPass {
  const SequenceLengths* rows = nullptr;  // of the hidden states that the pass begins with
  RotaryTable rotary;
  at::Tensor query_scale;    // [T, 1, 1]; undefined: none
  at::Tensor position_rows;  // [T]: of the table of learned positions
  // Deepstack: deepstack[k], [image tokens, hidden], is added at `image_rows` to what layer k gives.
  at::Tensor image_rows;
  std::vector<at::Tensor> deepstack;
  // Encoder-decoder: what the decoder is given while `rows` are the encoder's. Not there once it decodes.
  at::Tensor decoder_ids;  // [D]
  const SequenceLengths* decoder_rows = nullptr;
  RowCaches caches;  // inference only, one a row
  ForwardOptions options;
};

class LanguageModel : public Module {
 public:
  LanguageModel(int64_t vocab_size, int64_t hidden_size) : embed_tokens(vocab_size, hidden_size) {}

  virtual const TextConfig& config() const = 0;
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
  virtual void place(DecoderPass& pass, const at::Tensor& positions, const std::vector<Row>& rows,
                     at::ScalarType dtype) const = 0;
  // Before training with frozen weights: lets linears that read one input share one product (see lora/linear_stack.h).
  // Again after it, without pairs: rows of weights lie without gaps.
  virtual void stack_weights() {}
  // After each change of the pairs between these.
  virtual void refresh_pairs() {}
  // hidden: [T, hidden] → the decoder's states, [T, hidden] ([D, hidden] of an encoder-decoder), before the final norm.
  virtual at::Tensor forward(at::Tensor hidden, const DecoderPass& pass) const = 0;
  // Some of these states → what the head reads.
  virtual at::Tensor head_input(const at::Tensor& states, const ForwardOptions& options) const = 0;
  // Nothing where a step in `dtype` does more than a DecodeForm says.
  virtual std::optional<DecodeForm> decode_form(at::ScalarType dtype) const = 0;
  // Null: a decoder alone.
  virtual const Module* encoder() const { return nullptr; }

  Embedding embed_tokens;
};

}  // namespace martlet
