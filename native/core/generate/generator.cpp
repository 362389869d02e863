#include "core/generate/generator.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/memory.h"
#include "core/generate/fast_decoder.h"
#include "core/nn/matvec.h"

namespace martlet {
namespace {

class Stopwatch {
 public:
  explicit Stopwatch(at::Device device) : device_(device), start_(std::chrono::steady_clock::now()) {}
  double lap_ms() {
    synchronize(device_);
    const auto now = std::chrono::steady_clock::now();
    const double ms = std::chrono::duration<double, std::milli>(now - start_).count();
    start_ = now;
    return ms;
  }

 private:
  at::Device device_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace

Generation generate(const VisionLanguageModel& model, const Sample& prompt, const GenerateOptions& options,
                    at::Device device, JobContext& job, const std::function<void(int64_t)>& on_token) {
  const c10::InferenceMode inference;
  const LanguageModel& language_model = model.language_model();
  const PackedBatch batch = pack({&prompt}, model, device);
  Generation out;
  out.prompt_tokens = batch.tokens;
  const int64_t max_positions = model.info().max_positions;
  if (max_positions > 0 && batch.tokens >= max_positions) {
    fail(code::kConfig,
         "The prompt has " + std::to_string(batch.tokens) + " tokens (image tokens included); the model has " +
             std::to_string(max_positions) + " positions. Shorten the text or send fewer pictures.",
         {{"promptTokens", batch.tokens}, {"maxPositions", max_positions}});
  }
  const int64_t limit =
      max_positions > 0 ? std::min(options.max_new_tokens, max_positions - batch.tokens) : options.max_new_tokens;

  Stopwatch watch(device);
  const ForwardOptions forward = {.job = &job};
  auto [hidden, pass] = embed(model, batch, forward, /*vision_needs_grad=*/false);
  out.vision_ms = watch.lap_ms();
  job.check();

  KvCache cache(language_model.config().num_layers);
  pass.cache = &cache;
  hidden = language_model.forward(hidden, pass);
  pass.deepstack.clear();
  int64_t next_position = batch.next_positions[0];
  const auto logits_at_end = [&](const at::Tensor& states) {
    const at::Tensor last = language_model.head_input(states.narrow(0, states.size(0) - 1, 1), forward);
    return product(last, model.head_weight(), at::Tensor()).squeeze(0);
  };
  // What an encoder reads is not repeated by its decoder.
  Sampler sampler(options.sampling, model.info().is_encoder_decoder()
                                        ? std::vector<int64_t>{model.info().decoder_start_id}
                                        : prompt.input_ids);
  out.finish_reason = "length";
  if (limit > 0) {
    int64_t token = sampler.next(logits_at_end(hidden));
    out.prefill_ms = watch.lap_ms();
    std::unique_ptr<FastDecoder> fast;
    while (true) {
      job.check();
      const auto& stops = options.stop_token_ids;
      if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
        out.finish_reason = "stop";
        break;
      }
      out.token_ids.push_back(token);
      on_token(token);
      if (static_cast<int64_t>(out.token_ids.size()) == limit) break;
      if (out.token_ids.size() == 1) {  // after the first has been told
        fast = FastDecoder::make(language_model, model.head_weight(), cache,
                                 {.next_position = next_position, .prompt = out.prompt_tokens, .steps = limit - 1});
        // It has a copy.
        if (fast != nullptr) cache = KvCache(language_model.config().num_layers);
      }
      if (fast != nullptr) {
        token = fast->next(token, sampler);
        continue;
      }
      const at::Tensor ids = at::full({1}, token, at::TensorOptions().dtype(at::kLong).device(device));
      const at::Tensor position = at::full({1}, next_position++, at::TensorOptions().dtype(at::kLong).device(device));
      language_model.place(pass, position, {{1, next_position, out.prompt_tokens}}, hidden.scalar_type());
      token = sampler.next(logits_at_end(language_model.forward(language_model.embed(ids), pass)));
    }
  }
  out.decode_ms = watch.lap_ms();
  return out;
}

}  // namespace martlet
