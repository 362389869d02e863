// Decoding at batch 1 on a GPU: each step is one CUDA graph of native/cuda's kernels over a cache of fixed size,
// instead of hundreds of launches. The reference is LanguageModel::forward with a KvCache.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "core/generate/sampler.h"
#include "core/language/language_model.h"
#include "cuda/kernels.h"

namespace martlet {

class FastDecoder {
 public:
  struct Options {
    int64_t next_position = 0;  // of the first token to come
    int64_t prompt = 0;         // tokens that the model was given at first
    int64_t steps = 0;          // at most
    bool graph = true;          // false: the same kernels one by one
    // Steps that the cache has room for at first; it grows by doubling.
    int64_t spare = 256;
  };
  // Goes on after what `cache` holds, of which it takes a copy. Null where the model or its place is of another form
  // (no kernels, float32, DoRA, weights of several dtypes).
  static std::unique_ptr<FastDecoder> make(const LanguageModel& model, const at::Tensor& head_weight,
                                           const KvCache& cache, const Options& options);
  ~FastDecoder();
  FastDecoder(const FastDecoder&) = delete;
  FastDecoder& operator=(const FastDecoder&) = delete;

  // The token after `token`, which is what the call before gave. Greedy: the step after this one is under way already
  // when it returns, so that the GPU never waits.
  int64_t next(int64_t token, Sampler& sampler);
  // [vocab], of the last step that was begun.
  const at::Tensor& logits() const { return logits_; }

 private:
  FastDecoder(const Options& options, const cuda::Kernels* kernels) : options_(options), kernels_(kernels) {}
  // Room for `steps` steps in all.
  void reserve(int64_t steps);
  void begin_step();

  Options options_;
  const cuda::Kernels* kernels_;
  cuda::Decode plan_ = {};
  std::vector<cuda::DecodeLayer> layers_;
  void* graph_ = nullptr;
  at::Tensor cache_;                                // [layers, 2, capacity, kv_heads, head_dim]
  at::Tensor cos_, sin_, query_scale_, positions_;  // of all steps
  at::Tensor distance_bias_, final_norm_;
  std::vector<KvCache::Memory> memory_;  // of each layer with cross-attention
  at::Tensor states_, qkv_, mixed_, product_, partial_, low_, logits_, token_, step_;
  at::Tensor answers_;  // two tokens in pinned memory
  int64_t length_ = 0, room_ = 0, begun_ = 0, read_ = 0;
};

}  // namespace martlet
