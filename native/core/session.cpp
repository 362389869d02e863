#include "core/session.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/memory.h"
#include "core/base/runtime.h"
#include "core/generate/generator.h"
#include "core/io/checkpoint.h"
#include "core/io/transfer.h"
#include "core/lora/adapter.h"
#include "core/lora/merge.h"
#include "core/models/describe.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"
#include "core/quant/fp8.h"
#include "core/train/loss.h"
#include "core/train/train_options.h"
#include "core/train/trainer.h"
#include "core/vision/image_ops.h"

namespace martlet {
namespace {

using nlohmann::json;

class Clock {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// A job's arguments: JSON beside the buffers that it points into by index.
struct Args {
  json values;
  const std::vector<BufferView>& buffers;

  const BufferView& buffer(const json& index) const {
    const size_t i = index.get<size_t>();
    if (i >= buffers.size()) fail(code::kInternal, "A job points to a buffer that was not sent.");
    return buffers[i];
  }
};

std::vector<int64_t> int32_buffer(const BufferView& view) {
  std::vector<int64_t> out(view.size / sizeof(int32_t));
  for (size_t i = 0; i < out.size(); ++i) {
    int32_t value;
    std::memcpy(&value, view.data + i * sizeof value, sizeof value);
    out[i] = value;
  }
  return out;
}

// `cache` null: nothing is looked up.
Picture parse_image(const json& image, const Args& args, FeatureCache* cache = nullptr) {
  const BufferView& rgb = args.buffer(image.at("buffer"));
  const int64_t width = image.at("width").get<int64_t>(), height = image.at("height").get<int64_t>();
  const int64_t frames = image.value("frames", int64_t{1});
  if (width < 1 || height < 1 || frames < 1 ||
      static_cast<size_t>(frames) * static_cast<size_t>(width) * static_cast<size_t>(height) * 3 != rgb.size) {
    fail(code::kImage, "A decoded picture's bytes do not fit its size.");
  }
  const std::string key = cache == nullptr ? "" : image.value("key", "");
  Picture picture;
  if (!key.empty()) {
    if (key.find_first_not_of("0123456789abcdef") != std::string::npos)
      fail(code::kInternal, "The key of a picture is not hexadecimal.");
    picture.features = cache->find(key);
  }
  if (picture.features != nullptr) {
    picture.grid = picture.features->grid;
  } else {
    picture = preprocess_image(rgb.data, frames, width, height, parse_image_plan(image.at("plan")));
  }
  picture.key = key;
  picture.video = image.contains("frames");
  picture.seconds_per_grid = image.value("secondsPerGrid", picture.seconds_per_grid);
  return picture;
}

Sample parse_sample(const json& value, const Args& args, const ModelInfo& model, FeatureCache* cache) {
  Sample sample;
  sample.id = value.value("id", "");
  sample.input_ids = int32_buffer(args.buffer(value.at("inputIds")));
  if (value.contains("labels")) {
    sample.labels = int32_buffer(args.buffer(value["labels"]));
    sample.decoder_labels = model.is_encoder_decoder();
    if (!sample.decoder_labels && sample.labels.size() != sample.input_ids.size())
      fail(code::kInternal, "labels and inputIds differ in length.");
  }
  for (const json& image : value.at("images")) sample.images.push_back(parse_image(image, args, cache));
  return sample;
}

std::vector<MicroBatch> parse_micro_batches(const Args& args, const ModelInfo& model, FeatureCache* cache) {
  std::vector<MicroBatch> out;
  for (const json& micro : args.values.at("microBatches")) {
    out.emplace_back();
    for (const json& sample : micro) out.back().push_back(parse_sample(sample, args, model, cache));
  }
  return out;
}

// Appends a tensor's bytes to the reply; gives its index.
size_t add_buffer(Reply& reply, const at::Tensor& tensor) {
  const at::Tensor flat = tensor.to(at::kCPU).contiguous();
  const auto* bytes = static_cast<const uint8_t*>(flat.const_data_ptr());
  reply.buffers.emplace_back(bytes, bytes + flat.nbytes());
  return reply.buffers.size() - 1;
}

size_t add_int32_buffer(Reply& reply, const std::vector<int64_t>& values) {
  return add_buffer(reply, at::tensor(values, at::kLong).to(at::kInt));
}

json memory_json(const MemoryStats& stats) {
  return {{"allocated", stats.allocated},
          {"peakAllocated", stats.peak_allocated},
          {"reserved", stats.reserved},
          {"peakReserved", stats.peak_reserved}};
}

}  // namespace

struct Session::Impl {
  std::string model_dir;
  json config;
  const Family* family = nullptr;
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  std::unique_ptr<VisionLanguageModel> model;
  std::map<std::string, Adapter> adapters;
  std::optional<FeatureCache> features;
  double peak_flops = 0;             // of the device, once a run has begun
  std::unique_ptr<Trainer> trainer;  // destroyed before the model it points into

  VisionLanguageModel& loaded() {
    if (!model) fail(code::kInternal, "No model is loaded.");
    return *model;
  }

  Trainer& training() {
    if (!trainer) fail(code::kInternal, "No training run was begun.");
    return *trainer;
  }

  // Switches on the adapter that a job names, for that job.
  void use_adapter(const json& args) {
    // A run asks its own model between steps (predict_with_generate).
    if (trainer && args.value("trained", false)) return;
    if (trainer) fail(code::kConfig, "The model is being trained; wait until the run has ended.");
    const std::string name = args.value("adapter", "");
    if (name.empty()) return activate(loaded(), nullptr);
    const auto it = adapters.find(name);
    if (it == adapters.end()) fail(code::kAdapter, "No adapter named \"" + name + "\" is loaded.", {{"adapter", name}});
    activate(loaded(), &it->second);
  }

  // The cache, where a job's pictures always become the same in front of the language model.
  FeatureCache* cache_for(const json& args, bool train) {
    if (!features) return nullptr;
    if (trainer) return trainer->features_are_fixed(train) ? &*features : nullptr;
    const auto it = adapters.find(args.value("adapter", ""));
    if (it == adapters.end()) return &*features;
    const auto is_language = [&](const auto& entry) { return loaded().part_of(entry.first) == Part::kLanguage; };
    const Adapter& adapter = it->second;
    return std::all_of(adapter.layers.begin(), adapter.layers.end(), is_language) &&
                   std::all_of(adapter.saved.begin(), adapter.saved.end(), is_language)
               ? &*features
               : nullptr;
  }
  // Reports have it where pictures are kept.
  void add_cache_counts(json& result) const {
    if (!features) return;
    const FeatureCache::Counts& counts = features->counts();
    result["visionCache"] = {{"hits", counts.hits}, {"misses", counts.misses}, {"bytes", counts.bytes}};
    if (!counts.error.empty()) result["visionCache"]["error"] = counts.error;
  }

  json load(const json& args, JobContext& job);
  json load_adapter(const json& args);
  json score(const Args& args, Reply& reply, JobContext& job);
  // An answer to each of the requests.
  json generate_answers(const Args& args, const json& requests, Reply& reply, JobContext& job);
  json begin_training(const json& args);
};

json Session::Impl::load(const json& args, JobContext& job) {
  if (model) fail(code::kInternal, "This engine holds a model already.");
  const Clock clock;
  model_dir = args.at("modelDir").get<std::string>();
  const std::filesystem::path config_path = std::filesystem::path(model_dir) / "config.json";
  if (!std::filesystem::exists(config_path)) {
    fail(code::kModelNotFound, "There is no config.json in " + model_dir + ": it is not a model folder.",
         {{"path", model_dir}});
  }
  config = read_json_file(config_path);
  // Some families' files do not say it; the tokenizer does.
  if (args.contains("imageTokenId") && !config.contains("image_token_id")) {
    config["image_token_id"] = args["imageTokenId"];
  }
  family = &family_for(config, model_dir);
  device = parse_device(args.at("device").get<std::string>());
  use_threads(device);
  const Checkpoint checkpoint = Checkpoint::open(model_dir);

  std::map<std::string, std::string> stored, quantized_parts;  // canonical → as in the file
  const std::set<std::string> all_names(checkpoint.names().begin(), checkpoint.names().end());
  for (const std::string& name : checkpoint.names()) {
    const std::string canonical = family->canonical_key(name);
    if (all_names.count(quantized_owner(name))) {
      quantized_parts.emplace(canonical, name);
      continue;
    }
    if (!stored.emplace(canonical, name).second &&
        !at::equal(checkpoint.tensor(stored[canonical]), checkpoint.tensor(name))) {
      fail(code::kWeights,
           "The checkpoint holds " + canonical + " twice, under two spellings (" + stored[canonical] + " and " + name +
               ") and with two values.",
           {{"keys", {stored[canonical], name}}});
    }
  }
  const WeightSource weights = [&](const std::string& name) {
    const auto it = stored.find(name);
    return it == stored.end() ? at::Tensor() : checkpoint.tensor(it->second);
  };
  auto fresh = create_model(*family, config, model_dir, weights);

  const std::string wanted = args.at("dtype").get<std::string>();
  std::set<std::string> used;
  int64_t parameters = 0, total = 0;
  fresh->visit_parameters([&](const std::string& name, Parameter&) {
    ++total;
    (void)name;
  });
  if (wanted != "auto") {
    dtype = parse_dtype(wanted);
  } else {
    std::vector<std::pair<std::string, TensorInfo>> tensors;
    for (const auto& [canonical, name] : stored) tensors.emplace_back(canonical, checkpoint.info(name));
    dtype = stored_dtype(*fresh, tensors);
  }
  LoadOptions options;
  options.dtype = dtype;
  options.device = device;
  options.quantization.method = QuantizationOptions::parse(args.value("quantization", "none"));
  options.quantization.double_quantization = args.value("doubleQuantization", true);
  if (options.quantization.enabled() && !quantized_parts.empty()) {
    fail(code::kConfig, model_dir + " is quantised already: leave quantization out, or take the original model.",
         {{"path", model_dir}});
  }
  const auto method = options.quantization.method;
  const std::set<std::string> quantizable = quantizable_weights(*fresh, method);
  json warnings = json::array();
  if (method == QuantizationOptions::Method::kFp8) {
    require_fp8(device, dtype);
    if (const std::string text = fp8_warning(*fresh); !text.empty()) warnings.push_back(text);
  }
  options.is_quantized = [&](const std::string& name) { return quantizable.count(name) > 0; };
  options.keeps_float32 = [&](const std::string& name) { return fresh->keeps_float32(name); };
  options.quantized_parts = [&](const std::string& name) {
    const auto it = quantized_parts.find(name);
    return it == quantized_parts.end() ? at::Tensor() : checkpoint.tensor(it->second);
  };
  WeightReader reader;
  options.copy = [&](const at::Tensor& from, const at::Tensor& to, bool now) {
    reader.read(from, to);
    if (now) reader.wait();
  };
  int64_t done = 0, bytes = 0;
  options.on_parameter = [&](const std::string& name, int64_t size) {
    job.check();
    // Pages that a look at the tensor brought in need not stay beside the copy, nor the temporaries of quantising.
    if (const auto it = stored.find(name); it != stored.end()) checkpoint.release(it->second);
    if (options.quantization.enabled()) trim_heap();
    bytes += size;
    job.emit(json{{"type", "load"}, {"done", ++done}, {"total", total}, {"bytes", bytes}}.dump());
  };
  const at::NoGradGuard no_grad;
  fresh->load(
      [&](const std::string& name) {
        used.insert(name);
        const at::Tensor found = weights(name);
        // A file may hold one of two tied weights, whichever.
        const bool tied = fresh->has_tied_head() && name == fresh->info().embedding_key;
        return found.defined() || !tied ? found : weights(fresh->info().head_key);
      },
      options);
  reader.wait();
  fresh->verify();
  if (fresh->has_tied_head()) used.insert(fresh->info().head_key);  // a copy of the embedding
  std::vector<std::string> unexpected;
  for (const auto& [canonical, name] : stored) {
    if (!used.count(canonical) && !family->is_unused_key(config, canonical)) unexpected.push_back(name);
  }
  if (!unexpected.empty()) {
    std::string list;
    for (size_t i = 0; i < unexpected.size() && i < 5; ++i) list += (i ? ", " : "") + unexpected[i];
    fail(code::kWeights,
         "The checkpoint holds " + std::to_string(unexpected.size()) + " tensor(s) that this model does not have: " +
             list + (unexpected.size() > 5 ? ", …" : "") + ". Check that config.json belongs to these weights.",
         {{"unexpected", unexpected}});
  }
  std::string quantization = quantized_parts.empty() ? args.value("quantization", "none") : "stored";
  fresh->visit_parameters([&](const std::string&, Parameter& p) { parameters += p.numel(); });
  synchronize(device);
  model = std::move(fresh);
  if (const auto it = args.find("visionCache"); it != args.end()) {
    FeatureCacheOptions cache;
    cache.max_bytes = it->at("bytes").get<size_t>();
    cache.pinned = !device.is_cpu();
    if (it->contains("dir")) {
      cache.dir = it->at("dir").get<std::string>();
      cache.fingerprint = feature_fingerprint(*model, config, device);
      cache.pinned = false;
    }
    features.emplace(std::move(cache));
  }
  const ModelInfo& info = model->info();
  return {{"modelType", info.model_type},        {"family", info.family},        {"device", device.str()},
          {"dtype", dtype_name(dtype)},          {"parameters", parameters},     {"weightBytes", bytes},
          {"quantization", quantization},        {"vocabSize", info.vocab_size}, {"maxPositions", info.max_positions},
          {"imageTokenId", info.image_token_id}, {"warnings", warnings},         {"seconds", clock.seconds()}};
}

json Session::Impl::load_adapter(const json& args) {
  const std::string name = args.at("name").get<std::string>(), dir = args.at("dir").get<std::string>();
  if (trainer) fail(code::kConfig, "The model is being trained; load adapters before or after.");
  if (adapters.count(name))
    fail(code::kAdapter, "An adapter named \"" + name + "\" is loaded already.", {{"adapter", name}});
  const at::NoGradGuard no_grad;
  Adapter adapter = attach_adapter(
      loaded(), read_adapter(dir, family->canonical_key),
      [&](const std::string& key) { return family->is_unused_key(config, key); }, dtype, device, dir);
  const json result = {{"r", adapter.config.r},
                       {"alpha", adapter.config.lora_alpha},
                       {"parameters", adapter.numel()},
                       {"targets", adapter.layers.size()}};
  adapters.emplace(name, std::move(adapter));
  return result;
}

json Session::Impl::score(const Args& args, Reply& reply, JobContext& job) {
  use_adapter(args.values);
  const c10::InferenceMode inference;
  FeatureCache* cache = cache_for(args.values, /*train=*/false);
  const Sample sample = parse_sample(args.values.at("sample"), args, loaded().info(), cache);
  const PackedBatch batch = pack({&sample}, loaded(), device);
  if (batch.labelled == 0)
    fail(code::kUsage, "No token is labelled: score needs an assistant message.", {{"field", "messages"}});
  const LanguageModel& language_model = model->language_model();
  const ForwardOptions forward = {.job = &job};
  const DecoderInput input = embed(*model, batch, forward, /*vision_needs_grad=*/false, cache);
  const at::Tensor states = language_model.forward(input.hidden, input.pass).index_select(0, batch.predict_rows);
  const at::Tensor hidden = language_model.head_input(states, forward);
  const at::Tensor logprobs = target_logprobs(hidden, model->head_weight(), batch.targets).to(at::kCPU);
  json result = {{"loss", -logprobs.to(at::kDouble).mean().item<double>()}, {"logprobs", add_buffer(reply, logprobs)}};
  if (args.values.value("logits", false)) {
    const at::Tensor logits = at::linear(hidden, model->head_weight()).to(at::kFloat);
    result["logits"] = {{"buffer", add_buffer(reply, logits)}, {"shape", logits.sizes().vec()}};
  }
  return result;
}

json Session::Impl::generate_answers(const Args& args, const json& requests, Reply& reply, JobContext& job) {
  use_adapter(args.values);
  std::vector<Sample> samples;
  std::vector<GenerateRequest> wanted;
  FeatureCache* const features = cache_for(args.values, /*train=*/false);
  for (const json& v : requests) {
    samples.push_back(parse_sample(v.at("sample"), args, loaded().info(), features));
    GenerateRequest& request = wanted.emplace_back();
    request.options.features = features;
    request.options.max_new_tokens = v.at("maxNewTokens").get<int64_t>();
    request.options.sampling = {v.at("temperature").get<double>(), v.at("topP").get<double>(),
                                v.at("topK").get<int64_t>(), v.at("repetitionPenalty").get<double>(),
                                v.at("seed").get<uint64_t>()};
    request.options.stop_token_ids = v.at("stopTokenIds").get<std::vector<int64_t>>();
  }
  for (size_t i = 0; i < wanted.size(); ++i) wanted[i].prompt = &samples[i];
  GenerationListener listener;
  listener.on_token = [&job](size_t row, int64_t id) {
    job.emit("{\"type\":\"token\",\"row\":" + std::to_string(row) + ",\"id\":" + std::to_string(id) + "}");
  };
  if (args.values.contains("left")) {
    const BufferView& flags = args.buffer(args.values["left"]);
    if (flags.size != wanted.size()) fail(code::kInternal, "A batch needs one flag for each row.");
    // JavaScript writes them meanwhile.
    listener.has_left = [&flags](size_t row) {
      return std::atomic_ref(const_cast<uint8_t&>(flags.data[row])).load(std::memory_order_relaxed) != 0;
    };
  }
  json out = json::array();
  for (const Generation& answer : generate(loaded(), wanted, device, job, listener)) {
    out.push_back(
        {{"tokenIds", add_int32_buffer(reply, answer.token_ids)},
         {"promptTokens", answer.prompt_tokens},
         {"finishReason", answer.finish_reason},
         {"timings",
          {{"visionMs", answer.vision_ms}, {"prefillMs", answer.prefill_ms}, {"decodeMs", answer.decode_ms}}}});
  }
  return out;
}

json Session::Impl::begin_training(const json& args) {
  if (trainer) fail(code::kConfig, "A training run is under way on this model already.");
  const bool deterministic = args.value("deterministic", false);
  set_deterministic(deterministic);
  at::globalContext().setAllowTF32CuBLAS(args.value("tf32", false));
  trainer = std::make_unique<Trainer>(loaded(), *family, model_dir, parse_train_options(args), dtype, device);
  // Features do not stay what they were where the weights that they follow from are trained.
  if (trainer->trainable().vision + trainer->trainable().projector > 0) features.reset();
  if (features) trainer->keep_features(&*features);
  int64_t base = 0;
  model->visit_parameters([&](const std::string&, Parameter& p) { base += p.numel(); });
  if (peak_flops == 0) peak_flops = measured_peak_flops(device);
  const PartCounts parts = trainer->trainable();
  const bool full = args.at("method") == "full";
  json unmatched = json::array(), targets = json::array(), groups = json::array();
  for (const ParameterGroup& group : trainer->groups())
    groups.push_back({{"learningRate", group.learning_rate}, {"weightDecay", group.weight_decay}});
  for (const auto& [name, nearest] : trainer->targets().unmatched)
    unmatched.push_back({{"name", name}, {"nearest", nearest}});
  for (const auto& [path, linear] : trainer->targets().linears) targets.push_back(path);
  return {{"trainableParams", parts.total()},
          {"totalParams", full ? base : base + parts.total()},
          {"parts", {{"vision", parts.vision}, {"projector", parts.projector}, {"language", parts.language}}},
          {"groups", groups},
          {"targets", targets},
          {"unmatched", unmatched},
          {"warnings", trainer->targets().warnings}};
}

Session::Session() : impl_(std::make_unique<Impl>()) {}
Session::~Session() {
  impl_->trainer.reset();
  impl_->adapters.clear();
  impl_->model.reset();
  empty_cache(impl_->device);
}

Reply Session::handle(const std::string& method, const std::string& args_json, const std::vector<BufferView>& buffers,
                      JobContext& job) try {
  const Args args{json::parse(args_json), buffers};
  const json& v = args.values;
  Reply reply;
  json result = json::object();
  Impl& s = *impl_;
  if (method == "load") {
    result = s.load(v, job);
  } else if (method == "adapter.load") {
    result = s.load_adapter(v);
  } else if (method == "adapter.unload") {
    activate(s.loaded(), nullptr);
    if (s.adapters.erase(v.at("name").get<std::string>()) == 0)
      fail(code::kAdapter, "No adapter named " + v["name"].dump() + " is loaded.");
  } else if (method == "preprocess") {
    json pixels = json::array();
    const auto add = [&](const std::string& name, const at::Tensor& values) {
      pixels.push_back({{"name", name}, {"shape", values.sizes().vec()}, {"buffer", add_buffer(reply, values)}});
    };
    for (const json& entry : v.at("images")) {
      const Picture picture = parse_image(entry, args);
      const PatchGrid& grid = picture.grid;
      const at::Tensor values = picture.on(at::kCPU);
      if (picture.plan.patches && picture.plan.patches->side_by_side) {
        add("pixel_values", patches_side_by_side(values));
        add("tgt_sizes", at::tensor({grid.h, grid.w}, at::kFloat).view({1, 2}));
        continue;
      }
      add(picture.video ? "pixel_values_videos" : "pixel_values", values);
      if (grid.patches() == 0) continue;
      add(picture.video ? "video_grid_thw" : "image_grid_thw",
          at::tensor({grid.t, grid.h, grid.w}, at::kFloat).view({1, 3}));
    }
    result["pixels"] = std::move(pixels);
  } else if (method == "generate") {
    result = s.generate_answers(args, json::array({v}), reply, job)[0];
  } else if (method == "generate.batch") {
    result["answers"] = s.generate_answers(args, v.at("requests"), reply, job);
  } else if (method == "score") {
    result = s.score(args, reply, job);
  } else if (method == "train.begin") {
    result = s.begin_training(v);
  } else if (method == "train.step") {
    const Clock clock;
    reset_peak_memory(s.device);
    Trainer& trainer = s.training();
    const StepResult step = trainer.step(v.value("step", trainer.steps_done() + 1),
                                         parse_micro_batches(args, s.loaded().info(), s.cache_for(v, true)), job);
    result = {{"step", step.step},
              {"overflow", step.overflow},
              {"lossScale", step.loss_scale},
              {"loss", step.loss},
              {"gradNorm", step.grad_norm},
              {"learningRate", step.learning_rate},
              {"tokens", step.tokens},
              {"labelledTokens", step.labelled},
              {"correctTokens", step.correct},
              {"seconds", clock.seconds()},
              {"memory", memory_json(memory_stats(s.device))}};
    s.add_cache_counts(result);
    if (s.peak_flops > 0) result["modelFlopUtilisation"] = step.flops / clock.seconds() / s.peak_flops;
  } else if (method == "train.evaluate") {
    const StepResult step =
        s.training().evaluate(parse_micro_batches(args, s.loaded().info(), s.cache_for(v, false)), job);
    result = {{"loss", step.loss}, {"labelledTokens", step.labelled}, {"correctTokens", step.correct}};
  } else if (method == "train.gradients") {
    double loss = 0;
    json gradients = json::array();
    for (const auto& [name, gradient] :
         s.training().gradients(parse_micro_batches(args, s.loaded().info(), s.cache_for(v, true)), job, loss)) {
      gradients.push_back({{"name", name}, {"shape", gradient.sizes().vec()}, {"buffer", add_buffer(reply, gradient)}});
    }
    result = {{"loss", loss}, {"gradients", gradients}};
  } else if (method == "train.save") {
    result["files"] = s.training().save(v.at("dir").get<std::string>(), v.at("baseModel").get<std::string>(),
                                        v.at("maxShardSize").get<int64_t>(), job);
  } else if (method == "train.saveState") {
    result["files"] = s.training().save_state(v.at("dir").get<std::string>());
  } else if (method == "train.loadState") {
    result["step"] = s.training().load_state(v.at("dir").get<std::string>());
  } else if (method == "train.end") {
    std::optional<Adapter> adapter = s.training().release_adapter();
    s.trainer.reset();
    const std::string name = v.value("keepAs", "");
    if (adapter && !name.empty()) s.adapters.insert_or_assign(name, std::move(*adapter));
  } else if (method == "describe") {
    result = describe_model_json(v);
  } else if (method == "quantize") {
    result = quantize_checkpoint_json(v, job);
  } else if (method == "merge") {
    result = merge_adapter_json(v, job);
  } else if (method == "convert") {
    result = convert_checkpoint_json(v, job);
  } else if (method == "stats") {
    result = memory_json(memory_stats(s.device));
    s.add_cache_counts(result);
  } else if (method == "emptyCache") {
    empty_cache(s.device);
  } else if (method == "sleep") {
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(v.at("ms").get<int64_t>());
    while (std::chrono::steady_clock::now() < until) {
      job.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  } else {
    fail(code::kInternal, "The native engine has no method \"" + method + "\".");
  }
  reply.result = result.dump();
  return reply;
} catch (const c10::OutOfMemoryError&) {
  // What the job held is free by now: it goes back to the device, and the model stays usable.
  empty_cache(impl_->device);
  throw;
}

}  // namespace martlet
