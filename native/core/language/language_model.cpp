#include "core/language/language_model.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace martlet {

std::pair<at::Tensor, at::Tensor> KvCache::append(int64_t layer, const at::Tensor& k, const at::Tensor& v) {
  Layer& cache = layers_[layer];
  const int64_t needed = length_ + k.size(0);
  if (!cache.k.defined() || cache.k.size(0) < needed) {
    // 256 spare positions at first: most answers are short; then doubling.
    const int64_t capacity = cache.k.defined() ? std::max(needed, cache.k.size(0) * 2) : needed + 256;
    const auto grow = [&](const at::Tensor& old, const at::Tensor& like) {
      at::Tensor grown = at::empty({capacity, like.size(1), like.size(2)}, like.options());
      if (old.defined()) grown.narrow(0, 0, length_).copy_(old.narrow(0, 0, length_));
      return grown;
    };
    cache.k = grow(cache.k, k);
    cache.v = grow(cache.v, v);
  }
  cache.k.narrow(0, length_, k.size(0)).copy_(k);
  cache.v.narrow(0, length_, v.size(0)).copy_(v);
  return {cache.k.narrow(0, 0, needed), cache.v.narrow(0, 0, needed)};
}

namespace {

int64_t length_of(const SequenceLengths& rows, size_t row) { return rows.offsets[row + 1] - rows.offsets[row]; }

// of(row) for all rows, one under the other.
template <typename Fn>
at::Tensor by_row(const RowCaches& caches, Fn&& of) {
  if (caches.size() == 1) return of(0);
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < caches.size(); ++i) out.push_back(of(static_cast<int64_t>(i)));
  return at::cat(out);
}

}  // namespace

void append_prompts(const RowCaches& caches, int64_t layer, const at::Tensor& k, const at::Tensor& v,
                    const SequenceLengths& rows) {
  for (size_t i = 0; i < caches.size(); ++i) {
    const int64_t begin = rows.offsets[i], length = length_of(rows, i);
    caches[i]->append(layer, k.narrow(0, begin, length), v.narrow(0, begin, length));
  }
}

at::Tensor decode_attention(const RowCaches& caches, int64_t layer, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const AttentionExtras& extras) {
  return by_row(caches, [&](int64_t i) {
    const auto [keys, values] = caches[i]->append(layer, k.narrow(0, i, 1), v.narrow(0, i, 1));
    return decode_attention(q.narrow(0, i, 1), keys, values, extras);
  });
}

void keep_memory(const RowCaches& caches, int64_t layer, const KvCache::Memory& memory, const SequenceLengths& rows) {
  for (size_t i = 0; i < caches.size(); ++i) {
    const auto own = [&](const at::Tensor& x) { return x.narrow(0, rows.offsets[i], length_of(rows, i)); };
    caches[i]->memory(layer) = {own(memory.k), own(memory.v)};
  }
}

at::Tensor decode_cross_attention(const RowCaches& caches, int64_t layer, const at::Tensor& q,
                                  const AttentionExtras& extras) {
  return by_row(caches, [&](int64_t i) {
    const KvCache::Memory& memory = caches[i]->memory(layer);
    return decode_attention(q.narrow(0, i, 1), memory.k, memory.v, extras);
  });
}

void advance(const RowCaches& caches, const SequenceLengths* rows) {
  for (size_t i = 0; i < caches.size(); ++i) caches[i]->advance(rows != nullptr ? length_of(*rows, i) : 1);
}

}  // namespace martlet
