// Decoding one row or a few on a GPU: each step is one CUDA graph of native/cuda's kernels over caches of fixed size,
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
  static constexpr size_t kMaxRows = cuda::kMaxBatch;
  struct Row {
    const KvCache* cache = nullptr;  // it goes on after what this holds, of which it takes a copy
    int64_t next_position = 0;       // of the first token to come
    int64_t prompt = 0;              // tokens that the model was given at first
    int64_t steps = 0;               // at most
  };
  struct Options {
    bool graph = true;  // false: the same kernels one by one
    // Steps that the cache has room for at first; it grows by doubling.
    int64_t spare = 256;
  };
  // Null where the model, its place or the number of rows is of another form (no kernels, float32, DoRA, weights of
  // several dtypes).
  static std::unique_ptr<FastDecoder> make(const LanguageModel& model, const at::Tensor& head_weight,
                                           const std::vector<Row>& rows, const Options& options);
  ~FastDecoder();
  FastDecoder(const FastDecoder&) = delete;
  FastDecoder& operator=(const FastDecoder&) = delete;

  // For each row the token after `tokens`, which is what the call before gave. Where all are greedy, the step after
  // this one is under way already when it returns, so that the GPU never waits.
  std::vector<int64_t> next(const std::vector<int64_t>& tokens, const std::vector<Sampler*>& samplers);
  // Goes on with these of the rows, by their places in what next() was given; ascending.
  void keep(const std::vector<int64_t>& rows);
  // [rows, vocab], of the last step that was begun.
  at::Tensor logits() const;

 private:
  FastDecoder(const Options& options, const cuda::Kernels* kernels) : options_(options), kernels_(kernels) {}
  void make_tables(const LanguageModel& model, const DecodeForm& form, const std::vector<Row>& rows,
                   const at::Tensor& like);
  void copy_caches(const DecodeForm& form, const std::vector<Row>& rows, const at::Tensor& like);
  // Room for `steps` steps in all.
  void reserve(int64_t steps);
  // Drops the rows that have left.
  void compact();
  // The graph that is there waits for its last step and goes; plan and graph are made of the tensors as they are.
  void bind();
  void set_tokens(const std::vector<int64_t>& tokens);
  void begin_step();

  Options options_;
  const cuda::Kernels* kernels_;
  cuda::Decode plan_ = {};
  std::vector<cuda::DecodeLayer> layers_;
  void* graph_ = nullptr;
  at::Tensor cache_;                                // [layers, 2, batch, capacity, kv_heads, head_dim]
  at::Tensor cos_, sin_, query_scale_, positions_;  // [batch, steps, ..]
  at::Tensor prompts_, memories_;                   // [batch] int32
  at::Tensor distance_bias_, final_norm_;
  std::vector<KvCache::Memory> memory_;  // of each layer with cross-attention: [batch, places, heads, head_dim]
  at::Tensor states_, normed_, qkv_, mixed_, product_, partial_, arrivals_, low_, logits_, token_, step_;
  at::Tensor sums_, arrived_;  // products' scratch, where there are several rows
  at::Tensor answers_;         // [2, kMaxRows] tokens in pinned memory
  // Of the rows that are computed, which are wanted.
  std::vector<int64_t> live_;
  bool ahead_ = false;  // greedy and with a graph
  int64_t longest_ = 0, steps_ = 0, room_ = 0, begun_ = 0, read_ = 0;
};

}  // namespace martlet
