#include "core/nn/attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>

namespace martlet {
namespace {

// FlashAttention 2 is asked for by name: the choice of scaled_dot_product_attention may fall on cuDNN, which plans anew
// for each length that it sees. It takes heads of a multiple of 8, which all published models have.
bool uses_flash(const at::Tensor& q) { return q.is_cuda() && q.scalar_type() != at::kFloat && q.size(-1) % 8 == 0; }

}  // namespace

SequenceLengths SequenceLengths::from_lengths(const std::vector<int64_t>& lengths, at::Device device) {
  SequenceLengths rows;
  for (const int64_t length : lengths) {
    rows.offsets.push_back(rows.offsets.back() + length);
    rows.max_length = std::max(rows.max_length, length);
  }
  rows.cu_seqlens = at::tensor(rows.offsets, at::kLong).to(at::kInt).to(device);
  return rows;
}

namespace {

// [B, L, heads, d] → [B, L, heads, d]
at::Tensor batched(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  const bool grouped = q.size(2) != k.size(2);
  return at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), std::nullopt, 0.0,
                                          causal, std::nullopt, grouped)
      .transpose(1, 2);
}

}  // namespace

at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const SequenceLengths& rows,
                            bool causal) {
  return packed_attention(q, k, v, rows, rows, causal);
}

at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const SequenceLengths& q_rows, const SequenceLengths& k_rows, bool causal) {
  if (uses_flash(q)) {
    const std::optional<double> scale = std::nullopt;
    return std::get<0>(at::_flash_attention_forward(q, k, v, q_rows.cu_seqlens, k_rows.cu_seqlens, q_rows.max_length,
                                                    k_rows.max_length, 0.0, causal, /*return_debug_mask=*/false,
                                                    scale));
  }
  if (q_rows.uniform() && k_rows.uniform()) {
    const auto split = [&](const at::Tensor& x, const SequenceLengths& rows) {
      return x.view({rows.rows(), rows.max_length, x.size(1), x.size(2)});
    };
    return batched(split(q, q_rows), split(k, k_rows), split(v, k_rows), causal).flatten(0, 1);
  }
  // Rows of one length are one call.
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> groups;  // rows, by lengths of queries and keys
  for (int64_t i = 0; i < q_rows.rows(); ++i) {
    groups[{q_rows.offsets[i + 1] - q_rows.offsets[i], k_rows.offsets[i + 1] - k_rows.offsets[i]}].push_back(i);
  }
  std::vector<at::Tensor> parts, places;
  for (const auto& [lengths, members] : groups) {
    const auto positions = [&, &members = members](const SequenceLengths& rows, int64_t length) {
      std::vector<int64_t> starts;
      for (const int64_t row : members) starts.push_back(rows.offsets[row]);
      return (at::tensor(starts, at::kLong).unsqueeze(1) + at::arange(length, at::kLong)).flatten().to(q.device());
    };
    const auto group = [n = static_cast<int64_t>(members.size())](const at::Tensor& x, const at::Tensor& place) {
      return x.index_select(0, place).view({n, -1, x.size(1), x.size(2)});
    };
    const at::Tensor q_place = positions(q_rows, lengths.first), k_place = positions(k_rows, lengths.second);
    places.push_back(q_place);
    parts.push_back(batched(group(q, q_place), group(k, k_place), group(v, k_place), causal).flatten(0, 1));
  }
  return at::empty(q.sizes(), q.options()).index_copy(0, at::cat(places), at::cat(parts));
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const at::Tensor query = q.unsqueeze(0), keys = k.unsqueeze(0), values = v.unsqueeze(0);
  if (!uses_flash(q)) return batched(query, keys, values, /*causal=*/false).squeeze(0);
  const std::optional<double> scale = std::nullopt;
  return std::get<0>(at::_flash_attention_forward(query, keys, values, std::nullopt, std::nullopt, 1, k.size(0), 0.0,
                                                  /*is_causal=*/false, /*return_debug_mask=*/false, scale))
      .squeeze(0);
}

}  // namespace martlet
