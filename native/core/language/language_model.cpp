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

}  // namespace martlet
