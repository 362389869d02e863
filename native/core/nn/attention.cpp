#include "core/nn/attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/base/cpu_kernels.h"
#include "core/base/error.h"

namespace martlet {
namespace {

// FlashAttention 2 is asked for by name: the choice of scaled_dot_product_attention may fall on cuDNN, which plans anew
// for each shape that it sees. It takes heads of a multiple of 8, which all published models have.
bool uses_flash(const at::Tensor& q, const AttentionExtras& extras) {
  return q.is_cuda() && q.scalar_type() != at::kFloat && q.size(-1) % 8 == 0 && !extras.bias &&
         extras.dropout.active_rate(extras.source) == 0;
}

// cuDNN's attention takes 0.7 ms where FlashAttention 2 takes 1.2 (forward and backward of 8 rows of 1,024 with 32
// heads of 128, H200), but plans each shape first: 0.1 s, some seconds for the first. So only shapes that have come
// kPasses times are given to it: after two steps of a model of 32 layers.
class AttentionPlans {
 public:
  bool pays(const at::Tensor& q, const at::Tensor& k, const SequenceLengths& q_rows, const SequenceLengths& k_rows,
            bool causal) {
    constexpr int64_t kPasses = 64;
    static const bool allowed = [] {
      const char* wanted = std::getenv("MARTLET_ATTENTION");
      if (wanted != nullptr && std::string(wanted) != "flash")
        fail(code::kConfig, std::string("MARTLET_ATTENTION is \"") + wanted + "\": set it to flash, or not at all.");
      return wanted == nullptr;
    }();
    if (!allowed || !q_rows.recurring || !q_rows.uniform() || !k_rows.uniform() || q.size(2) > 128 ||
        (causal && q_rows.max_length != k_rows.max_length) || at::globalContext().deterministicAlgorithms())
      return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    return ++passes_[key(q, k, q_rows, k_rows, causal)] > kPasses;
  }
  // cuDNN has said no.
  void refuse(const at::Tensor& q, const at::Tensor& k, const SequenceLengths& q_rows, const SequenceLengths& k_rows,
              bool causal) {
    const std::lock_guard<std::mutex> lock(mutex_);
    passes_[key(q, k, q_rows, k_rows, causal)] = std::numeric_limits<int64_t>::min();
  }

 private:
  // Device, dtype, rows, lengths, heads and their size, distances between rows.
  using Key = std::array<int64_t, 11>;
  static Key key(const at::Tensor& q, const at::Tensor& k, const SequenceLengths& q_rows, const SequenceLengths& k_rows,
                 bool causal) {
    return {q.device().index(),
            static_cast<int64_t>(q.scalar_type()),
            q_rows.rows(),
            q_rows.max_length,
            k_rows.max_length,
            q.size(1),
            k.size(1),
            q.size(2),
            q.stride(0),
            k.stride(0),
            causal};
  }
  std::mutex mutex_;
  std::map<Key, int64_t> passes_;
};

AttentionPlans& attention_plans() {
  static AttentionPlans plans;
  return plans;
}

// [T, heads, d] → [rows, heads, length, d]
at::Tensor by_rows(const at::Tensor& x, int64_t rows) {
  return x.unflatten(0, {rows, x.size(0) / rows}).transpose(1, 2);
}
// Back again.
at::Tensor packed(const at::Tensor& x) { return x.transpose(1, 2).flatten(0, 1); }

// What cuDNN gives, and what its backward wants of it.
struct PlannedAttention {
  at::Tensor out, logsumexp, seed, offset;  // out: [T, heads, d]
};
// Nothing where a plan does not pay, or cuDNN has none.
std::optional<PlannedAttention> planned_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                  const SequenceLengths& q_rows, const SequenceLengths& k_rows,
                                                  bool causal, bool backward, std::optional<double> scale) {
  if (!attention_plans().pays(q, k, q_rows, k_rows, causal)) return std::nullopt;
  try {
    const auto result = at::_scaled_dot_product_cudnn_attention(
        by_rows(q, q_rows.rows()), by_rows(k, k_rows.rows()), by_rows(v, k_rows.rows()), std::nullopt,
        /*compute_log_sumexp=*/backward, 0.0, causal, /*return_debug_mask=*/false, scale);
    return PlannedAttention{packed(std::get<0>(result)), std::get<1>(result), std::get<6>(result), std::get<7>(result)};
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error&) {
    attention_plans().refuse(q, k, q_rows, k_rows, causal);
    return std::nullopt;
  }
}

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

// [B, L, heads, d] → [B, L, heads, d]. `part`: which of several calls of one pass.
at::Tensor batched(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                   const AttentionExtras& extras, int64_t part = 0) {
  const bool grouped = q.size(2) != k.size(2);
  const at::Tensor queries = q.transpose(1, 2), keys = k.transpose(1, 2), values = v.transpose(1, 2);
  const bool drops = extras.dropout.active_rate(extras.source) > 0;
  std::optional<at::Tensor> mask;
  if (extras.bias) mask = extras.bias(q.size(1), k.size(1)).to(q.scalar_type()).unsqueeze(0);
  if (causal && (mask || drops)) {
    // Added, since a bias and the causal flag exclude each other.
    const at::Tensor later =
        at::full({q.size(1), k.size(1)}, -std::numeric_limits<double>::infinity(), q.options()).triu(1);
    mask = mask ? *mask + later : later;
  }
  if (!drops) {
    return at::scaled_dot_product_attention(queries, keys, values, mask, 0.0, causal && !mask, extras.scale, grouped)
        .transpose(1, 2);
  }
  // The operator draws its masks from a generator that a recomputed layer could not rewind.
  const auto repeated = [&](const at::Tensor& x) {
    return grouped ? x.repeat_interleave(q.size(2) / k.size(2), 1) : x;
  };
  const double scale = extras.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
  at::Tensor scores = at::matmul(queries * scale, repeated(keys).transpose(2, 3));
  if (mask) scores = scores + *mask;
  const at::Tensor weights = extras.dropout.forward(at::softmax(scores, -1), extras.source, part);
  return at::matmul(weights, repeated(values)).transpose(1, 2);
}

}  // namespace

at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const SequenceLengths& rows,
                            bool causal, const AttentionExtras& extras) {
  return packed_attention(q, k, v, rows, rows, causal, extras);
}

at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const SequenceLengths& q_rows, const SequenceLengths& k_rows, bool causal,
                            const AttentionExtras& extras) {
  if (uses_flash(q, extras)) {
    const bool graph = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
    if (const auto planned = planned_attention(q, k, v, q_rows, k_rows, causal, graph, extras.scale))
      return planned->out;
    return std::get<0>(at::_flash_attention_forward(q, k, v, q_rows.cu_seqlens, k_rows.cu_seqlens, q_rows.max_length,
                                                    k_rows.max_length, 0.0, causal, /*return_debug_mask=*/false,
                                                    extras.scale));
  }
  if (q_rows.uniform() && k_rows.uniform()) {
    const auto split = [&](const at::Tensor& x, const SequenceLengths& rows) {
      return x.view({rows.rows(), rows.max_length, x.size(1), x.size(2)});
    };
    return batched(split(q, q_rows), split(k, k_rows), split(v, k_rows), causal, extras).flatten(0, 1);
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
    const auto part = static_cast<int64_t>(places.size());
    places.push_back(q_place);
    parts.push_back(
        batched(group(q, q_place), group(k, k_place), group(v, k_place), causal, extras, part).flatten(0, 1));
  }
  return at::empty(q.sizes(), q.options()).index_copy(0, at::cat(places), at::cat(parts));
}

namespace {

// Recording, for callers that have left autograd (AutoDispatchBelowADInplaceOrView) too.
class Recorded {
 public:
  Recorded() : keys_(keys()), mode_(true) {}

 private:
  static c10::impl::LocalDispatchKeySet keys() {
    c10::impl::LocalDispatchKeySet own = c10::impl::tls_local_dispatch_key_set();
    own.excluded_ = own.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
    return own;
  }
  c10::impl::ForceDispatchKeyGuard keys_;
  at::AutoGradMode mode_;
};

}  // namespace

AttentionPass::AttentionPass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const SequenceLengths& rows)
    : inputs_{q, k, v}, rows_(&rows) {
  if (uses_flash(q, {})) {
    if (auto planned = planned_attention(q, k, v, rows, rows, /*causal=*/true, /*backward=*/true, std::nullopt)) {
      planned_ = true;
      out_ = std::move(planned->out);
      logsumexp_ = std::move(planned->logsumexp);
      rng_state_ = std::move(planned->seed);
      unused_ = std::move(planned->offset);
      return;
    }
    flash_forward();
    return;
  }
  const Recorded recorded;
  for (at::Tensor& input : inputs_) input = input.detach().requires_grad_(true);
  recorded_ = packed_attention(inputs_[0], inputs_[1], inputs_[2], rows, /*causal=*/true);
  out_ = recorded_.detach();
}

void AttentionPass::flash_forward() {
  std::tie(out_, logsumexp_, rng_state_, unused_, std::ignore) =
      at::_flash_attention_forward(inputs_[0], inputs_[1], inputs_[2], rows_->cu_seqlens, rows_->cu_seqlens,
                                   rows_->max_length, rows_->max_length, 0.0,
                                   /*is_causal=*/true, /*return_debug_mask=*/false);
}

std::array<at::Tensor, 3> AttentionPass::backward(const at::Tensor& dout) {
  if (planned_) {
    const auto rows = [this](const at::Tensor& x) { return by_rows(x, rows_->rows()); };
    try {
      const auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
          rows(dout), rows(inputs_[0]), rows(inputs_[1]), rows(inputs_[2]), rows(out_), logsumexp_, rng_state_, unused_,
          /*attn_bias=*/at::Tensor(), /*cum_seq_q=*/at::Tensor(), /*cum_seq_k=*/at::Tensor(), rows_->max_length,
          rows_->max_length, 0.0, /*is_causal=*/true);
      return {packed(dq), packed(dk), packed(dv)};
    } catch (const c10::OutOfMemoryError&) {
      throw;
    } catch (const c10::Error&) {
      attention_plans().refuse(inputs_[0], inputs_[1], *rows_, *rows_, /*causal=*/true);
      flash_forward();
    }
  }
  if (!recorded_.defined()) {
    const auto [dq, dk, dv] =
        at::_flash_attention_backward(dout, inputs_[0], inputs_[1], inputs_[2], out_, logsumexp_, rows_->cu_seqlens,
                                      rows_->cu_seqlens, rows_->max_length, rows_->max_length, 0.0,
                                      /*is_causal=*/true, rng_state_, unused_);
    return {dq, dk, dv};
  }
  const Recorded recorded;
  const auto grads = torch::autograd::grad({recorded_}, {inputs_.begin(), inputs_.end()}, {dout});
  recorded_.reset();
  return {grads[0], grads[1], grads[2]};
}

namespace {

// scaled_dot_product_attention of one query multiplies 16-bit numbers by MKL's matrix-vector product, plain loops on
// processors of other makers than Intel: of a small quantised decoder's step they are a quarter.
bool takes_on_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionExtras& extras) {
  const bool recorded = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return best_isa() != Isa::kPlain && q.is_cpu() &&
         (q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf) && !recorded && !extras.bias &&
         extras.dropout.active_rate(extras.source) == 0;
}

// decode_attention() of 16-bit numbers, each key and value read once for the query heads that share it. All in float32
// but the result.
at::Tensor decode_on_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t length = k.size(0), kv_heads = k.size(1), dim = k.size(2), heads = q.size(1), group = heads / kv_heads;
  const at::ScalarType dtype = q.scalar_type();
  const at::Tensor keys = k.contiguous(), values = v.contiguous();
  const at::Tensor queries = q.squeeze(0).to(at::kFloat).mul_(scale).contiguous();
  at::Tensor scores = at::empty({heads, length}, queries.options()), mixed = at::zeros({heads, dim}, queries.options());
  const auto* query = queries.const_data_ptr<float>();
  auto* score = scores.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / (heads * dim));
  parallel_ranges(length, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> key(dim);
    for (int64_t i = begin * kv_heads; i < end * kv_heads; ++i) {
      load_floats(kernels, keys.const_data_ptr(), i * dim, dim, dtype, key.data());
      for (int64_t head = i % kv_heads * group; head < (i % kv_heads + 1) * group; ++head)
        score[head * length + i / kv_heads] = kernels.dot(query + head * dim, key.data(), dim);
    }
  });
  const at::Tensor weights = at::softmax(scores, -1);
  const auto* weight = weights.const_data_ptr<float>();
  auto* out = mixed.mutable_data_ptr<float>();
  parallel_ranges(heads, (int64_t{1} << 14) / (length * dim), [&](int64_t begin, int64_t end) {
    std::vector<float> value(dim);
    for (int64_t own = begin / group; own * group < end; ++own) {
      const int64_t first = std::max(begin, own * group), last = std::min(end, (own + 1) * group);
      for (int64_t place = 0; place < length; ++place) {
        load_floats(kernels, values.const_data_ptr(), (place * kv_heads + own) * dim, dim, dtype, value.data());
        for (int64_t head = first; head < last; ++head)
          kernels.add(value.data(), dim, weight[head * length + place], out + head * dim);
      }
    }
  });
  return mixed.to(dtype).unsqueeze(0);
}

}  // namespace

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionExtras& extras) {
  if (takes_on_cpu(q, k, v, extras))
    return decode_on_cpu(q, k, v, extras.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(2)))));
  const at::Tensor query = q.unsqueeze(0), keys = k.unsqueeze(0), values = v.unsqueeze(0);
  if (!uses_flash(q, extras)) return batched(query, keys, values, /*causal=*/false, extras).squeeze(0);
  return std::get<0>(at::_flash_attention_forward(query, keys, values, std::nullopt, std::nullopt, 1, k.size(0), 0.0,
                                                  /*is_causal=*/false, /*return_debug_mask=*/false, extras.scale))
      .squeeze(0);
}

}  // namespace martlet
