#include "core/generate/generator.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <deque>
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
    const double ms = elapsed_ms();
    start_ = std::chrono::steady_clock::now();
    return ms;
  }
  // Of the host: what it has been told.
  double elapsed_ms() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  at::Device device_;
  std::chrono::steady_clock::time_point start_;
};

constexpr size_t kMaxRowsAtOnce = FastDecoder::kMaxRows;
// Of prompts packed into one pass: enough to fill a GPU, and less than a training step's states.
constexpr int64_t kPromptTokensAtOnce = 4096;

// One request on its way.
struct Answer {
  Answer(const GenerateRequest& request, size_t row, const VisionLanguageModel& model)
      : row(row),
        prompt(*request.prompt),
        options(request.options),
        cache(model.language_model().config().num_layers),
        // What an encoder reads is not repeated by its decoder.
        sampler(options.sampling, model.info().is_encoder_decoder()
                                      ? std::vector<int64_t>{model.info().decoder_start_id}
                                      : request.prompt->input_ids) {}
  size_t row;
  const Sample& prompt;
  const GenerateOptions& options;
  KvCache cache;
  Sampler sampler;
  int64_t limit = 0, next_position = 0, token = 0;
  Generation out;

  // The next token; false: the answer has ended.
  bool take(int64_t next, const GenerationListener& listener) {
    const std::vector<int64_t>& stops = options.stop_token_ids;
    if (std::find(stops.begin(), stops.end(), next) != stops.end()) {
      out.finish_reason = "stop";
      return false;
    }
    token = next;
    out.token_ids.push_back(next);
    listener.on_token(row, next);
    if (static_cast<int64_t>(out.token_ids.size()) == limit) return false;
    if (!listener.has_left(row)) return true;
    out.finish_reason = "stop";
    return false;
  }
};

// What the head gives of some states: [rows, vocab].
at::Tensor logits_of(const VisionLanguageModel& model, const at::Tensor& states, const ForwardOptions& options) {
  return product(model.language_model().head_input(states, options), model.head_weight(), at::Tensor());
}

// How many new tokens a prompt leaves room for.
int64_t room_after(const GenerateRequest& request, const VisionLanguageModel& model) {
  const auto tokens = static_cast<int64_t>(request.prompt->input_ids.size());
  const int64_t max_positions = model.info().max_positions, wanted = request.options.max_new_tokens;
  if (max_positions == 0) return wanted;
  if (tokens >= max_positions) {
    fail(code::kUsage,
         "The prompt has " + std::to_string(tokens) + " tokens (image tokens included); the model has " +
             std::to_string(max_positions) + " positions. Shorten the text or send fewer pictures.",
         {{"promptTokens", tokens}, {"maxPositions", max_positions}});
  }
  return std::min(wanted, max_positions - tokens);
}

// Reads the prompts of these in one pass, packed; gives the answers that have begun.
std::vector<Answer*> read_prompts(const VisionLanguageModel& model, const std::vector<Answer*>& answers,
                                  at::Device device, JobContext& job, const GenerationListener& listener) {
  std::vector<const Sample*> prompts;
  for (const Answer* answer : answers) prompts.push_back(&answer->prompt);
  const PackedBatch batch = pack(prompts, model, device);

  Stopwatch watch(device);
  const ForwardOptions forward = {.job = &job};
  auto [hidden, pass] = embed(model, batch, forward, /*vision_needs_grad=*/false, answers[0]->options.features);
  const double vision_ms = watch.lap_ms();
  job.check();

  for (Answer* answer : answers) pass.caches.push_back(&answer->cache);
  hidden = model.language_model().forward(hidden, pass);
  const SequenceLengths& states = model.info().is_encoder_decoder() ? batch.decoder_rows : batch.rows;
  std::vector<int64_t> ends;
  std::vector<Sampler*> samplers;
  for (size_t i = 0; i < answers.size(); ++i) {
    ends.push_back(states.offsets[i + 1] - 1);
    samplers.push_back(&answers[i]->sampler);
  }
  const at::Tensor last = hidden.index_select(0, at::tensor(ends, at::kLong).to(device));
  const std::vector<int64_t> tokens = next_tokens(samplers, logits_of(model, last, forward));
  const double prefill_ms = watch.lap_ms();
  job.check();

  std::vector<Answer*> begun;
  for (size_t i = 0; i < answers.size(); ++i) {
    Answer& answer = *answers[i];
    answer.next_position = batch.next_positions[i];
    answer.out.prompt_tokens = batch.rows.offsets[i + 1] - batch.rows.offsets[i];
    answer.out.vision_ms = vision_ms;
    answer.out.prefill_ms = prefill_ms;
    answer.out.finish_reason = "length";
    if (answer.limit > 0 && answer.take(tokens[i], listener)) begun.push_back(&answer);
  }
  return begun;
}

// One new position of each answer: its next token.
std::vector<int64_t> step(const VisionLanguageModel& model, const std::vector<Answer*>& answers, at::Device device,
                          JobContext& job) {
  const LanguageModel& language_model = model.language_model();
  std::vector<int64_t> ids, positions;
  std::vector<LanguageModel::Row> rows;
  std::vector<Sampler*> samplers;
  DecoderPass pass;
  pass.options.job = &job;
  for (Answer* answer : answers) {
    ids.push_back(answer->token);
    positions.push_back(answer->next_position++);
    rows.push_back({1, answer->next_position, answer->out.prompt_tokens});
    samplers.push_back(&answer->sampler);
    pass.caches.push_back(&answer->cache);
  }
  const auto to_device = [device](const std::vector<int64_t>& x) { return at::tensor(x, at::kLong).to(device); };
  const at::Tensor hidden = language_model.embed(to_device(ids));
  language_model.place(pass, to_device(positions), rows, hidden.scalar_type());
  return next_tokens(samplers, logits_of(model, language_model.forward(hidden, pass), pass.options));
}

// Null where the answers are not of a form that it takes; else the caches are in it.
std::unique_ptr<FastDecoder> fast_decoder(const VisionLanguageModel& model, const std::vector<Answer*>& answers) {
  std::vector<FastDecoder::Row> rows;
  for (const Answer* answer : answers)
    rows.push_back({&answer->cache, answer->next_position, answer->out.prompt_tokens, answer->limit - 1});
  auto fast = FastDecoder::make(model.language_model(), model.head_weight(), rows, {});
  if (fast == nullptr) return nullptr;
  for (Answer* answer : answers) answer->cache = KvCache(model.language_model().config().num_layers);
  return fast;
}

std::vector<int64_t> step(FastDecoder& fast, const std::vector<Answer*>& answers) {
  std::vector<int64_t> tokens;
  std::vector<Sampler*> samplers;
  for (Answer* answer : answers) {
    tokens.push_back(answer->token);
    samplers.push_back(&answer->sampler);
  }
  return fast.next(tokens, samplers);
}

// Until all have ended.
void decode(const VisionLanguageModel& model, std::vector<Answer*> live, at::Device device, JobContext& job,
            const GenerationListener& listener) {
  const Stopwatch watch(device);
  const std::unique_ptr<FastDecoder> fast = fast_decoder(model, live);
  while (!live.empty()) {
    job.check();
    const std::vector<int64_t> tokens = fast != nullptr ? step(*fast, live) : step(model, live, device, job);
    std::vector<Answer*> going_on;
    std::vector<int64_t> places;
    for (size_t i = 0; i < live.size(); ++i) {
      if (live[i]->take(tokens[i], listener)) {
        going_on.push_back(live[i]);
        places.push_back(static_cast<int64_t>(i));
      } else {
        live[i]->out.decode_ms = watch.elapsed_ms();
      }
    }
    if (fast != nullptr && places.size() < live.size()) fast->keep(places);
    live = std::move(going_on);
  }
}

}  // namespace

std::vector<Generation> generate(const VisionLanguageModel& model, const std::vector<GenerateRequest>& requests,
                                 at::Device device, JobContext& job, const GenerationListener& listener) {
  const c10::InferenceMode inference;
  std::vector<Generation> out;
  while (out.size() < requests.size()) {
    const size_t begin = out.size(), count = std::min(requests.size() - begin, kMaxRowsAtOnce);
    std::deque<Answer> answers;
    std::vector<Answer*> live;
    for (size_t row = begin; row < begin + count;) {
      std::vector<Answer*> packed;
      for (int64_t tokens = 0; row < begin + count; ++row) {
        tokens += static_cast<int64_t>(requests[row].prompt->input_ids.size());
        if (!packed.empty() && tokens > kPromptTokensAtOnce) break;
        packed.push_back(&answers.emplace_back(requests[row], row, model));
        packed.back()->limit = room_after(requests[row], model);
      }
      const auto begun = read_prompts(model, packed, device, job, listener);
      live.insert(live.end(), begun.begin(), begun.end());
    }
    decode(model, live, device, job, listener);
    for (Answer& answer : answers) out.push_back(std::move(answer.out));
  }
  return out;
}

}  // namespace martlet
