// Picks the next token from a row of logits, in the order of transformers' logits processors: repetition penalty,
// temperature, top-k, top-p.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <random>
#include <vector>

namespace martlet {

struct SamplingOptions {
  double temperature = 0.0;  // 0 = greedy
  double top_p = 1.0;
  int64_t top_k = 0;  // 0 = off
  double repetition_penalty = 1.0;
  uint64_t seed = 0;
};

// Throws ERR_MARTLET_NON_FINITE.
[[noreturn]] void fail_not_finite();

class Sampler {
 public:
  Sampler(const SamplingOptions& options, const std::vector<int64_t>& prompt);
  // logits: [vocab], any device and float dtype.
  int64_t next(const at::Tensor& logits);
  // Greedy and without penalty: next() is the highest logit's id, whatever came before.
  bool is_argmax() const { return options_.temperature <= 0 && options_.repetition_penalty == 1.0; }

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
  std::vector<int64_t> seen_;  // prompt and answer, for the repetition penalty
};

// For each row of logits, [rows, vocab], its sampler's choice.
std::vector<int64_t> next_tokens(const std::vector<Sampler*>& samplers, const at::Tensor& logits);

}  // namespace martlet
