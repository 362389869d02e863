// Answers: prefill of the whole prompt, then one position at a time against the key-value cache.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/base/job.h"
#include "core/generate/sampler.h"
#include "core/models/model.h"
#include "core/train/batch.h"

namespace martlet {

struct GenerateOptions {
  int64_t max_new_tokens = 512;
  SamplingOptions sampling;
  std::vector<int64_t> stop_token_ids;
  FeatureCache* features = nullptr;  // of pictures
};

struct Generation {
  std::vector<int64_t> token_ids;  // without the stop token
  int64_t prompt_tokens = 0;
  std::string finish_reason;             // stop | length
  double vision_ms = 0, prefill_ms = 0;  // of the prompts that were read with this one, together
  double decode_ms = 0;                  // until this row ended
};

struct GenerateRequest {
  const Sample* prompt = nullptr;
  GenerateOptions options;
};

// What the caller hears and says of a row while its answer comes.
struct GenerationListener {
  std::function<void(size_t row, int64_t token)> on_token;
  // Asked after each token: true ends the row's answer.
  std::function<bool(size_t row)> has_left = [](size_t) { return false; };
};

// An answer to each request, 16 at once. Their prompts are read packed, some thousand tokens at once; then each step is
// one new position of every row that has not ended. With temperature 0 a row's tokens are those that it gives alone, as
// far as the arithmetic of a product does not depend on how many rows it has.
std::vector<Generation> generate(const VisionLanguageModel& model, const std::vector<GenerateRequest>& requests,
                                 at::Device device, JobContext& job, const GenerationListener& listener);

}  // namespace martlet
