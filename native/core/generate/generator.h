// One answer: prefill of the whole prompt, then one position at a time against the key-value cache.
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
  std::string finish_reason;  // stop | length
  double vision_ms = 0, prefill_ms = 0, decode_ms = 0;
};

// `on_token` is called for each token of the answer as it comes.
Generation generate(const VisionLanguageModel& model, const Sample& prompt, const GenerateOptions& options,
                    at::Device device, JobContext& job, const std::function<void(int64_t)>& on_token);

}  // namespace martlet
