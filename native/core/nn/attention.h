// Attention over rows of different lengths packed one after the other, without padding.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <vector>

#include "core/nn/dropout.h"

namespace martlet {

// Where each packed row begins. Row i is [offsets[i], offsets[i + 1]).
struct SequenceLengths {
  std::vector<int64_t> offsets{0};  // rows + 1
  at::Tensor cu_seqlens;            // the same as int32 on the device
  int64_t max_length = 0;
  // Such rows are likely to come again many times: an attention that is planned for their shape pays.
  bool recurring = false;

  static SequenceLengths from_lengths(const std::vector<int64_t>& lengths, at::Device device);
  int64_t rows() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t total() const { return offsets.back(); }
  bool uniform() const { return total() == rows() * max_length; }
};

// What some models' attention has beside q, k and v.
struct AttentionExtras {
  std::optional<double> scale;  // 1/√d
  // Added to the scores of rows of so many queries and keys, [heads, queries, keys]; the last query stands at the last
  // key.
  std::function<at::Tensor(int64_t queries, int64_t keys)> bias;
  // Of the weights.
  ModelDropout dropout;
  const DropoutSource* source = nullptr;
};

// q: [T, heads, d], k and v: [T, kv_heads, d] → [T, heads, d]; each row attends to itself only. Softmax in float32.
// CUDA with 16-bit numbers, no bias and no dropout: one FlashAttention call (cu_seqlens), or cuDNN's, which is up to
// twice as fast, for rows of one length that recur (MARTLET_ATTENTION=flash: never). Elsewhere one batched call for
// each length that occurs.
at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const SequenceLengths& rows,
                            bool causal, const AttentionExtras& extras = {});
// Row i of the queries attends to row i of the keys.
at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const SequenceLengths& q_rows, const SequenceLengths& k_rows, bool causal,
                            const AttentionExtras& extras = {});

// Causal packed_attention() for callers with a backward of their own, which is called once.
class AttentionPass {
 public:
  AttentionPass() = default;
  // q, k, v and rows must stay as they are until the backward.
  AttentionPass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const SequenceLengths& rows);
  const at::Tensor& out() const { return out_; }  // [T, heads, d]
  // Gradients of q, k and v.
  std::array<at::Tensor, 3> backward(const at::Tensor& dout);
  bool planned() const { return planned_; }  // it was cuDNN's

 private:
  void flash_forward();
  std::array<at::Tensor, 3> inputs_;
  at::Tensor out_, logsumexp_, rng_state_, unused_;
  const SequenceLengths* rows_ = nullptr;
  bool planned_ = false;
  at::Tensor recorded_;  // where autograd does it: the output with its graph
};

// One new position against a cache: q: [1, heads, d], k and v: [length, kv_heads, d] → [1, heads, d].
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionExtras& extras = {});

}  // namespace martlet
