// Attention over rows of different lengths packed one after the other, without padding.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace martlet {

// Where each packed row begins. Row i is [offsets[i], offsets[i + 1]).
struct SequenceLengths {
  std::vector<int64_t> offsets{0};  // rows + 1
  at::Tensor cu_seqlens;            // the same as int32 on the device
  int64_t max_length = 0;

  static SequenceLengths from_lengths(const std::vector<int64_t>& lengths, at::Device device);
  int64_t rows() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t total() const { return offsets.back(); }
  bool uniform() const { return total() == rows() * max_length; }
};

// q: [T, heads, d], k and v: [T, kv_heads, d] → [T, heads, d]; each row attends to itself only. Scale 1/√d, softmax in
// float32. CUDA with 16-bit numbers: one FlashAttention call (cu_seqlens). Elsewhere one batched call for each length
// that occurs.
at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const SequenceLengths& rows,
                            bool causal);
// Row i of the queries attends to row i of the keys.
at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const SequenceLengths& q_rows, const SequenceLengths& k_rows, bool causal);

// One new position against a cache: q: [1, heads, d], k and v: [length, kv_heads, d] → [1, heads, d].
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace martlet
