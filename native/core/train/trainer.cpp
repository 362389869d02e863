#include "core/train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/rng.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"
#include "core/nn/norm.h"
#include "core/train/loss.h"

namespace martlet {
namespace {

constexpr const char* kStateFile = "optimizer.safetensors";
// Set apart from the dropout masks, which are drawn with the layers' indices.
constexpr uint64_t kNoiseStream = uint64_t{1} << 40;

bool ends_with(const std::string& text, const std::string& tail) {
  return text.size() >= tail.size() && text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

// Weights as the checkpoint has them, by canonical name.
class StoredWeights {
 public:
  StoredWeights(const std::string& dir, const Family& family) : checkpoint_(Checkpoint::open(dir)) {
    for (const std::string& name : checkpoint_.names()) stored_.emplace(family.canonical_key(name), name);
  }
  at::Tensor tensor(const std::string& name) const { return checkpoint_.tensor(stored_.at(name)); }
  // Module paths of the matrices among them that `is_unused` says the model never reads.
  std::vector<std::string> unused_matrices(const std::function<bool(const std::string&)>& is_unused) const {
    std::vector<std::string> paths;
    for (const auto& [canonical, name] : stored_) {
      const std::string tail = ".weight";
      if (ends_with(canonical, tail) && checkpoint_.info(name).shape.size() == 2 && is_unused(canonical))
        paths.push_back(canonical.substr(0, canonical.size() - tail.size()));
    }
    return paths;
  }
  // A patch convolution is kept as a matrix here, and as what it is in files.
  at::Tensor as_stored(const std::string& name, const at::Tensor& value) const {
    const auto it = stored_.find(name);
    if (it == stored_.end()) return value;
    const TensorInfo& info = checkpoint_.info(it->second);
    int64_t elements = 1;
    for (const int64_t extent : info.shape) elements *= extent;
    return elements == value.numel() ? value.reshape(info.shape) : value;
  }

 private:
  Checkpoint checkpoint_;
  std::map<std::string, std::string> stored_;
};

}  // namespace

Trainer::Trainer(VisionLanguageModel& model, const Family& family, std::string model_dir, const TrainOptions& options,
                 at::ScalarType dtype, at::Device device)
    : model_(model),
      family_(family),
      model_dir_(std::move(model_dir)),
      options_(options),
      dtype_(dtype),
      device_(device),
      scaler_(dtype == at::kHalf) {
  const at::NoGradGuard no_grad;
  std::vector<TrainedParameter> trained;
  GroupBuilder groups(options_.rates);
  if (options_.full) {
    begin_full(trained, groups);
  } else {
    begin_lora(trained, groups);
  }
  parameters_ = std::make_unique<FlatParameters>(std::move(trained), groups.groups(), device_);
  if (!options_.full) visit_language([](LanguageModel& language) { language.stack_weights(); });
  optimizer_ = make_optimizer(options_.optimizer, *parameters_);
  flops_.emplace(model_, options_.full, options_.full ? 0 : adapter_.numel());
  dropout_.generator = make_generator(device_);
  dropout_.model_rate = options_.dropout;
  if (options_.dropout.value_or(0) > 0 && !model_.info().has_dropout) {
    fail(code::kConfig,
         "dropout is " + std::to_string(*options_.dropout) + ", but this model has no dropout of its own.",
         {{"path", "dropout"}});
  }
}

void Trainer::begin_full(std::vector<TrainedParameter>& trained, GroupBuilder& groups) {
  std::set<std::string> layer_norms;
  model_.visit([&](const std::string& path, Module& module) {
    if (dynamic_cast<LayerNorm*>(&module) != nullptr) layer_norms.insert(path);
  });
  const ParameterSelection selection =
      select_full(model_, options_.freeze, options_.saved.rules, family_.canonical_key);
  targets_.unmatched = selection.unmatched;
  for (const auto& [name, parameter] : selection.parameters) {
    if (parameter->quantized) {
      fail(
          code::kConfig,
          "sft_type: full cannot train quantised weights (" + name + "). Take the model in 16 bits, or train adapters.",
          {{"path", "sft_type"}});
    }
    const Part part = model_.part_of(name);
    const bool decayed = is_decayed(name, layer_norms.count(name.substr(0, name.rfind('.'))) > 0);
    trained.push_back(
        {name, &parameter->value, groups.group(part, decayed, /*fast=*/false), parameter->value.scalar_type()});
    trainable_.add(part, parameter->numel());
  }
}

void Trainer::begin_lora(std::vector<TrainedParameter>& trained, GroupBuilder& groups) {
  const nlohmann::json config = read_json_file(std::filesystem::path(model_dir_) / "config.json");
  const auto is_unused = [&](const std::string& key) { return family_.is_unused_key(config, key); };
  const auto linears = linears_of(model_);
  // As a whole, unless targets say by name that its modules get pairs.
  const bool whole_projector = model_.info().whole_projector && !options_.freeze.projector &&
                               std::none_of(linears.begin(), linears.end(), [&](const auto& entry) {
                                 return model_.part_of(entry.first) == Part::kProjector &&
                                        is_named_target(entry.first, options_.target_names, options_.target_regex);
                               });
  options_.saved.projector = whole_projector;
  if (!options_.adapter_dir.empty()) {
    adapter_ = attach_adapter(model_, read_adapter(options_.adapter_dir, family_.canonical_key), is_unused, at::kFloat,
                              device_, options_.adapter_dir);
    for (auto& [path, layer] : adapter_.layers) {
      layer.dropout = options_.lora.lora_dropout;
      targets_.linears.emplace_back(path, linears.at(path));
    }
    adapter_.config.lora_dropout = options_.lora.lora_dropout;
    warn_of_thawed_parts();
    if (whole_projector) {
      // Where the adapter does not bring it along, it begins as it is in the model.
      SavedModuleOptions projector;
      projector.projector = true;
      const ParameterSelection selection = select_saved(model_, adapter_, projector, family_.canonical_key);
      for (const std::string& module : selection.modules) {
        std::vector<std::string>& saved = adapter_.config.modules_to_save;
        if (std::find(saved.begin(), saved.end(), module) == saved.end()) saved.push_back(module);
      }
      for (const auto& [name, parameter] : selection.parameters)
        adapter_.saved.emplace(name, parameter->dense().clone());
    }
  } else {
    FreezeFlags freeze = options_.freeze;
    // What is trained as a whole gets no pairs.
    if (options_.saved.vision_and_projector) freeze.vision = freeze.projector = true;
    if (whole_projector) freeze.projector = true;
    const StoredWeights stored(model_dir_, family_);
    targets_ = select_targets(model_, options_.target_names, options_.target_regex, freeze,
                              stored.unused_matrices(is_unused), options_.saved.modules_to_save);
    const bool pissa = options_.init.type == LoraInit::Type::kPissa;
    for (const auto& [path, linear] : targets_.linears) {
      if (pissa && linear->weight.quantized) {
        fail(code::kConfig,
             "init_weights: pissa takes the base weights apart, which quantised ones do not allow. Use lora instead of "
             "qlora and no base_dtype: fp8, or init_weights: true.",
             {{"path", "init_weights"}});
      }
    }
    adapter_ = create_adapter(targets_, options_.lora, options_.init, options_.seed, device_);
    if (pissa) {
      for (const auto& [path, layer] : adapter_.layers) pissa_[path] = {layer.a.clone(), layer.b.clone(), at::Tensor()};
      subtract_pairs(model_, adapter_, [&](const std::string& name) { return stored.tensor(name).to(dtype_); });
    }
    SavedModuleOptions saved = options_.saved;
    saved.bias = options_.lora.bias;
    const ParameterSelection selection = select_saved(model_, adapter_, saved, family_.canonical_key);
    targets_.unmatched.insert(targets_.unmatched.end(), selection.unmatched.begin(), selection.unmatched.end());
    adapter_.config.modules_to_save = selection.modules;
    for (const auto& [name, parameter] : selection.parameters) {
      if (parameter->quantized) {
        fail(code::kConfig,
             "modules_to_save: " + name +
                 " is quantised, and quantised weights cannot be trained as a whole. Use lora instead of qlora, "
                 "or leave it to target_modules.",
             {{"path", "modules_to_save"}, {"parameter", name}});
      }
      adapter_.saved.emplace(name, parameter->dense().clone());
    }
  }
  const auto count = [&](const std::string& path, int64_t n) {
    const Part part = model_.part_of(path);
    trainable_.add(part, n);
    return part;
  };
  const at::ScalarType pair_dtype = options_.lora_dtype.value_or(dtype_);
  for (auto& [path, layer] : adapter_.layers) {
    const Part part = count(path, layer.a.numel() + layer.b.numel());
    const std::string a = path + ".lora_A.weight", b = path + ".lora_B.weight";
    trained.push_back({a, &layer.a, groups.group(part, is_decayed(a, false), false), pair_dtype});
    trained.push_back({b, &layer.b, groups.group(part, is_decayed(b, false), true), pair_dtype});
    if (!layer.magnitude.defined()) continue;
    const std::string m = path + ".lora_magnitude_vector";
    count(path, layer.magnitude.numel());
    trained.push_back({m, &layer.magnitude, groups.group(part, is_decayed(m, false), true), at::kFloat});
  }
  activate(model_, &adapter_);
  if (adapter_.saved.empty()) return;
  model_.visit([&](const std::string& path, Module& module) {
    const bool layer_norm = dynamic_cast<LayerNorm*>(&module) != nullptr;
    for (Parameter* parameter : module.own_parameters()) {
      const std::string name = join_path(path, parameter->name);
      if (!adapter_.saved.count(name)) continue;
      const Part part = count(name, parameter->numel());
      const bool fast = parameter->shape.size() == 1;
      // In the dtype of what it stands for: an adapter's values come in float32.
      trained.push_back({name, &parameter->value, groups.group(part, is_decayed(name, layer_norm), fast),
                         parameter->replaced->scalar_type()});
    }
  });
}

// What a run from an adapter trains is what the adapter holds, as in PEFT and ms-swift: flags that freeze a part of it
// are without effect.
void Trainer::warn_of_thawed_parts() {
  struct Thawed {
    int64_t pairs = 0, saved = 0;
    std::string first;
  };
  std::map<Part, Thawed> parts;
  for (const auto& [path, layer] : adapter_.layers) {
    Thawed& part = parts[model_.part_of(path)];
    if (part.pairs++ == 0) part.first = path;
  }
  for (const auto& [name, value] : adapter_.saved) {
    Thawed& part = parts[model_.part_of(name)];
    ++part.saved;
    if (part.first.empty()) part.first = name;
  }
  for (const auto& [part, thawed] : parts) {
    if (!options_.freeze.frozen(part)) continue;
    targets_.warnings.push_back(
        std::string(freeze_flag(part)) + ": true is without effect: the adapter in " + options_.adapter_dir +
        " holds " +
        (thawed.pairs > 0 ? std::to_string(thawed.pairs) + " pair(s)" : std::to_string(thawed.saved) + " weight(s)") +
        " of the " + part_name(part) + " (" + thawed.first + (thawed.pairs + thawed.saved > 1 ? ", …" : "") +
        "), and what it holds is trained.");
  }
}

void Trainer::visit_language(const std::function<void(LanguageModel&)>& fn) {
  model_.visit([&fn](const std::string&, Module& module) {
    if (auto* language = dynamic_cast<LanguageModel*>(&module)) fn(*language);
  });
}

Trainer::~Trainer() { detach(); }

// The network's slots keep plain values, and the model its own weights.
void Trainer::detach() {
  if (!parameters_) return;
  optimizer_.reset();
  parameters_.reset();
  if (options_.full) return;
  model_.visit_parameters([&](const std::string& name, Parameter& parameter) {
    const auto it = adapter_.saved.find(name);
    if (it != adapter_.saved.end()) it->second = parameter.value;
  });
  activate(model_, nullptr);
  try {
    // Without room for pairs.
    visit_language([](LanguageModel& language) { language.stack_weights(); });
  } catch (const c10::Error&) {
    // No memory for a layer's copy: weights with gaps between their rows give the same.
  }
  if (pissa_.empty()) return;
  const auto linears = linears_of(model_);
  const StoredWeights stored(model_dir_, family_);
  for (const auto& [path, pair] : pissa_) linears.at(path)->weight.value.copy_(stored.tensor(path + ".weight"));
}

std::optional<Adapter> Trainer::release_adapter() {
  if (options_.full) return std::nullopt;
  const at::NoGradGuard no_grad;
  detach();
  for (auto& [path, layer] : adapter_.layers) {
    layer.dropout = 0;
    if (const auto it = pissa_.find(path); it != pissa_.end()) {
      layer.a = at::cat({layer.a, it->second.a.to(layer.a.scalar_type())}, 0);
      layer.b = at::cat({layer.b, it->second.b.neg().to(layer.b.scalar_type())}, 1);
    }
    if (layer.magnitude.defined()) refresh_weight_norm(linears_of(model_).at(path)->weight, layer);
  }
  return std::move(adapter_);
}

// What follows from the pairs as they are now: the copies of them beside stacked weights; DoRA's lengths of rows.
void Trainer::refresh_pairs() {
  const at::NoGradGuard no_grad;
  if (options_.full) return;
  visit_language([](LanguageModel& language) { language.refresh_pairs(); });
  if (!adapter_.config.use_dora) return;
  const auto linears = linears_of(model_);
  for (auto& [path, layer] : adapter_.layers) refresh_weight_norm(linears.at(path)->weight, layer);
}

// Uniform noise of ±alpha/√(length · width) on the embeddings of text, where each row has its own length.
at::Tensor Trainer::add_noise(const at::Tensor& hidden, const PackedBatch& batch) {
  const at::NoGradGuard no_grad;
  {
    std::lock_guard<std::mutex> lock(dropout_.generator.mutex());
    dropout_.generator.set_current_seed(mix_seed(dropout_.seed, kNoiseStream));
  }
  at::Tensor noise = at::empty(hidden.sizes(), hidden.options().dtype(at::kFloat)).uniform_(-1, 1, dropout_.generator);
  for (int64_t row = 0; row < batch.rows.rows(); ++row) {
    const int64_t begin = batch.rows.offsets[row], length = batch.rows.offsets[row + 1] - begin;
    noise.narrow(0, begin, length)
        .mul_(options_.neftune_alpha / std::sqrt(static_cast<double>(length * hidden.size(1))));
  }
  return noise.index_fill_(0, batch.image_rows, 0).to(hidden.scalar_type());
}

bool Trainer::features_are_fixed(bool train) const {
  const bool dropout = train && model_.info().has_dropout && options_.dropout.value_or(1) > 0;
  return trainable_.vision == 0 && trainable_.projector == 0 && !dropout;
}

StepResult Trainer::run(int64_t number, const std::vector<MicroBatch>& micro_batches, bool train, JobContext& job) {
  if (!parameters_) fail(code::kInternal, "This training run has ended.");
  StepResult result;
  int64_t labelled = 0;
  for (const MicroBatch& micro : micro_batches) {
    for (const Sample& sample : micro) labelled += count_labelled(sample);
  }
  if (labelled == 0) fail(code::kConfig, "No token of this batch is labelled: there is nothing to learn from it.");
  const bool vision_trains = train && (trainable_.vision > 0 || trainable_.projector > 0);
  const double scale = 1.0 / static_cast<double>(labelled);
  const double loss_scale = train ? scaler_.scale() : 1.0;

  at::AutoGradMode grad_mode(train);
  at::Tensor loss_sum = at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device_));
  at::Tensor correct = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(device_));
  int64_t done = 0;
  bool fresh = !train;  // what follows from the pairs
  // The tower may have DoRA's too.
  if (!fresh && adapter_.config.use_dora) {
    refresh_pairs();
    fresh = true;
  }
  for (const MicroBatch& micro : micro_batches) {
    job.check();
    std::vector<const Sample*> samples;
    for (const Sample& sample : micro) samples.push_back(&sample);
    PackedBatch batch = pack(samples, model_, device_);
    batch.rows.recurring = true;
    result.tokens += batch.tokens + batch.decoder_rows.total();
    result.flops += flops_->training(batch);
    if (batch.labelled > 0) {
      dropout_.seed = mix_seed(mix_seed(options_.seed, static_cast<uint64_t>(number - 1)), static_cast<uint64_t>(done));
      ForwardOptions options;
      options.dropout = train ? &dropout_ : nullptr;
      options.recompute = train ? options_.recompute : Recompute::kNone;
      options.training = train;
      options.job = &job;
      ForwardOptions vision = options;
      vision.recompute = train && options_.vision_recompute ? Recompute::kLayer : Recompute::kNone;
      DecoderInput input = embed(model_, batch, vision, vision_trains, features_);  // outlives the backward pass
      // While a GPU is at the pictures: it is some milliseconds of the host's.
      if (!fresh) refresh_pairs();
      fresh = true;
      input.pass.options = options;
      if (train && options_.neftune_alpha > 0) input.hidden = input.hidden + add_noise(input.hidden, batch);
      // Recomputed layers need an input that requires grad even where nothing before them is trained.
      if (options.recompute != Recompute::kNone && !input.hidden.requires_grad()) input.hidden.requires_grad_(true);
      const at::Tensor hidden = model_.language_model().forward(input.hidden, input.pass);
      const at::Tensor selected =
          model_.language_model().head_input(hidden.index_select(0, batch.predict_rows), options);
      const LossOutput loss = chunked_cross_entropy(selected, model_.head_weight(), batch.targets, scale * loss_scale,
                                                    train ? options_.label_smoothing : 0.0);
      correct.add_(loss.correct);
      loss_sum.add_(loss.loss.detach());
      if (train) {
        job.check();
        torch::autograd::backward({loss.loss}, {});
        parameters_->collect_micro_batch();
      }
    }
    job.emit("{\"type\":\"micro\",\"done\":" + std::to_string(++done) +
             ",\"total\":" + std::to_string(micro_batches.size()) + "}");
  }
  result.labelled = labelled;
  result.loss = loss_sum.item<double>() / loss_scale;
  result.correct = correct.item<int64_t>();
  return result;
}

StepResult Trainer::step(int64_t number, const std::vector<MicroBatch>& micro_batches, JobContext& job) {
  if (!parameters_) fail(code::kInternal, "This training run has ended.");
  parameters_->zero_grad();
  StepResult result = run(number, micro_batches, /*train=*/true, job);
  const at::NoGradGuard no_grad;
  if (!std::isfinite(result.loss)) fail_non_finite(number, /*loss=*/true, micro_batches, job);
  const at::Tensor norm = parameters_->grad_norm() / scaler_.scale();
  result.grad_norm = norm.item<double>();
  result.loss_scale = scaler_.scale();
  result.overflow = !std::isfinite(result.grad_norm);
  // A scale of 1 that still overflows is no matter of scaling.
  if (result.overflow && scaler_.scale() <= 1) fail_non_finite(number, /*loss=*/false, micro_batches, job);
  job.check();
  result.learning_rate = options_.rates.learning_rate * options_.schedule.factor(updates_);
  if (!result.overflow) {
    at::Tensor factor = at::full({}, 1.0 / scaler_.scale(), norm.options());
    // As torch.nn.utils.clip_grad_norm_.
    if (options_.max_grad_norm > 0) factor = factor * (options_.max_grad_norm / (norm + 1e-6)).clamp_max(1.0);
    if (scaler_.on() || options_.max_grad_norm > 0) parameters_->scale_grad(factor);
    optimizer_->step(options_.schedule.factor(updates_));
    ++updates_;
  }
  scaler_.update(result.overflow);
  result.step = step_ = number;
  return result;
}

void Trainer::fail_non_finite(int64_t number, bool loss, const std::vector<MicroBatch>& micro_batches,
                              JobContext& job) {
  const at::NoGradGuard no_grad;
  nlohmann::json samples = nlohmann::json::array();
  std::string where;
  if (loss) {
    // Each row alone: the first module that does not give finite numbers, and the rows that bring it about.
    std::map<const Module*, std::string> paths;
    model_.visit([&](const std::string& path, Module& module) { paths[&module] = path; });
    for (const MicroBatch& micro : micro_batches) {
      for (const Sample& sample : micro) {
        if (count_labelled(sample) == 0) continue;
        std::string first;
        StepResult alone;
        {
          const OutputObserver observer([&](const Module& module, const at::Tensor& output) {
            if (first.empty() && !output.isfinite().all().item<bool>()) first = paths[&module];
          });
          alone = run(number, {{sample}}, /*train=*/false, job);
        }
        if (std::isfinite(alone.loss)) continue;
        samples.push_back(sample.id);
        if (where.empty()) where = first.empty() ? "the loss itself" : "the output of " + first;
      }
    }
    if (where.empty()) where = "only with dropout or noise";
  } else {
    for (size_t i = 0; i < parameters_->parameters().size() && where.empty(); ++i) {
      if (!parameters_->grad_view(i).isfinite().all().item<bool>())
        where = "the gradient of " + parameters_->parameters()[i].name;
    }
  }
  if (samples.empty()) {
    for (const MicroBatch& micro : micro_batches) {
      for (const Sample& sample : micro) samples.push_back(sample.id);
    }
  }
  fail(code::kNonFinite,
       "Step " + std::to_string(number) + ": the " + (loss ? "loss" : "gradient norm") +
           " is not finite (first: " + where +
           "); the weights were not changed. Lower the learning rate, use bfloat16 or float32, or look at the "
           "rows named.",
       {{"step", number}, {"samples", samples}, {"where", where}});
}

StepResult Trainer::evaluate(const std::vector<MicroBatch>& micro_batches, JobContext& job) {
  refresh_pairs();
  StepResult result = run(step_ + 1, micro_batches, /*train=*/false, job);
  result.step = step_;
  return result;
}

std::vector<std::pair<std::string, at::Tensor>> Trainer::gradients(const std::vector<MicroBatch>& micro_batches,
                                                                   JobContext& job, double& loss) {
  if (!parameters_) fail(code::kInternal, "This training run has ended.");
  parameters_->zero_grad();
  loss = run(step_ + 1, micro_batches, /*train=*/true, job).loss;
  const at::NoGradGuard no_grad;
  parameters_->scale_grad(at::full({}, 1.0 / scaler_.scale(), parameters_->grad().options()));
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (size_t i = 0; i < parameters_->parameters().size(); ++i) {
    out.emplace_back(parameters_->parameters()[i].name, parameters_->grad_view(i).to(at::kCPU).clone());
  }
  parameters_->zero_grad();
  return out;
}

std::vector<std::string> Trainer::save(const std::string& dir, const std::string& base_model, int64_t max_shard_size,
                                       JobContext& job) const {
  if (options_.full) return save_full(dir, max_shard_size, job);
  AdapterWeights weights;
  weights.config = adapter_.config;
  weights.config.base_model_name_or_path = base_model;
  const std::vector<TrainedParameter>& parameters = parameters_->parameters();
  const at::ScalarType pair_dtype = options_.lora_dtype.value_or(at::kFloat);
  std::optional<StoredWeights> stored;
  if (!adapter_.saved.empty()) stored.emplace(model_dir_, family_);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const std::string& name = parameters[i].name;
    const at::Tensor value = parameters_->master_view(i).detach();
    const size_t cut = name.rfind(".lora_");
    if (cut == std::string::npos) {
      weights.saved_modules.emplace(name, stored->as_stored(name, value.to(parameters[i].dtype)));
      continue;
    }
    LoraWeights& pair = weights.pairs[name.substr(0, cut)];
    (ends_with(name, "_magnitude_vector") ? pair.magnitude
     : name[cut + 6] == 'A' ? pair.a
                            : pair.b) = value.to(ends_with(name, "_magnitude_vector") ? at::kFloat : pair_dtype);
  }
  if (!pissa_.empty()) {
    // ΔW = B A − B₀ A₀ as one pair of twice the rank on the untouched base (PEFT's subtract_mutated_init).
    for (auto& [path, pair] : weights.pairs) {
      const LoraWeights& first = pissa_.at(path);
      pair.a = at::cat({pair.a, first.a.to(pair_dtype)}, 0);
      pair.b = at::cat({pair.b, first.b.neg().to(pair_dtype)}, 1);
    }
    weights.config.r *= 2;
    weights.config.lora_alpha *= weights.config.use_rslora ? std::sqrt(2.0) : 2.0;
  }
  return write_adapter(dir, weights);
}

// Every tensor of the base checkpoint in its order and spelling; those that were trained with their new values, in the
// dtype they had.
std::vector<std::string> Trainer::save_full(const std::string& dir, int64_t max_shard_size, JobContext& job) const {
  std::map<std::string, at::Tensor> values;
  for (size_t i = 0; i < parameters_->parameters().size(); ++i)
    values[parameters_->parameters()[i].name] = parameters_->master_view(i);
  const ModelInfo& own = model_.info();
  const Checkpoint base = Checkpoint::open(model_dir_);
  ShardPlan plan;
  for (const std::string& name : base.names()) plan.push_back(base.info(name));
  ShardWriter writer(dir, plan, max_shard_size);
  for (const std::string& name : base.names()) {
    job.check();
    const TensorInfo& info = base.info(name);
    const std::string key = family_.canonical_key(name);
    const auto it = values.find(key == own.head_key && model_.has_tied_head() ? own.embedding_key : key);
    if (it == values.end()) {
      writer.add(name, base.tensor(name));
    } else {
      writer.add(name, it->second.detach().reshape(info.shape).to(info.dtype));
    }
  }
  return writer.finish();
}

std::vector<std::string> Trainer::save_state(const std::string& dir) const {
  const auto path = std::filesystem::path(dir) / kStateFile;
  NamedTensors state = optimizer_->state();
  state.emplace_back("master", parameters_->master());
  for (const auto& [module, pair] : pissa_) {
    state.emplace_back("pissa." + module + ".lora_A", pair.a);
    state.emplace_back("pissa." + module + ".lora_B", pair.b);
  }
  char scale[32];
  std::snprintf(scale, sizeof scale, "%.17g", scaler_.scale());
  write_safetensors(path.string(), state,
                    {{"format", "pt"},
                     {"step", std::to_string(step_)},
                     {"updates", std::to_string(updates_)},
                     {"loss_scale", scale},
                     {"scaler_good_steps", std::to_string(scaler_.good_steps())}});
  return {kStateFile};
}

int64_t Trainer::load_state(const std::string& dir) {
  const at::NoGradGuard no_grad;
  const auto path = std::filesystem::path(dir) / kStateFile;
  const auto file = SafetensorsFile::open(path.string());
  NamedTensors stored;
  for (const TensorInfo& info : file->tensors()) stored.emplace_back(info.name, file->tensor(info.name));
  const auto number = [&](const char* key) {
    const auto it = file->metadata().find(key);
    if (it == file->metadata().end()) {
      fail(code::kIo, path.string() + " does not say at which step it was written (" + key + ").",
           {{"path", path.string()}});
    }
    return std::strtod(it->second.c_str(), nullptr);
  };
  const auto step = static_cast<int64_t>(number("step")), updates = static_cast<int64_t>(number("updates"));
  const double scale = number("loss_scale");
  const auto good_steps = static_cast<int64_t>(number("scaler_good_steps"));
  NamedTensors own = optimizer_->state();
  own.emplace_back("master", parameters_->master());
  for (const auto& [module, pair] : pissa_) {
    own.emplace_back("pissa." + module + ".lora_A", pair.a);
    own.emplace_back("pissa." + module + ".lora_B", pair.b);
  }
  copy_state(own, stored);
  parameters_->refresh_compute();
  if (!pissa_.empty()) {
    // The base was reduced by the stored pairs, whatever this machine's decomposition gives.
    Adapter first;
    for (const auto& [module, pair] : pissa_) {
      LoraLayer& layer = first.layers[module];
      layer.a = pair.a;
      layer.b = pair.b;
      layer.scaling = adapter_.layers.at(module).scaling;
    }
    const StoredWeights base(model_dir_, family_);
    subtract_pairs(model_, first, [&](const std::string& name) { return base.tensor(name).to(dtype_); });
  }
  scaler_.restore(scale, good_steps);
  step_ = step;
  updates_ = updates;
  return step_;
}

}  // namespace martlet
