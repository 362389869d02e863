#include "core/train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <regex>

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/rng.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"
#include "core/train/loss.h"

namespace martlet {
namespace {

constexpr const char* kStateFile = "optimizer.safetensors";

// transformers' Trainer (get_decay_parameter_names): no decay for LayerNorm modules, nor for names with bias,
// layernorm, rmsnorm, or a part that is `norm` or ends in `_norm`.
bool is_decayed(const Module& module, const std::string& name) {
  static const std::regex spared("bias|layernorm|rmsnorm|(^|\\.|_)norm(\\.|$)", std::regex::icase);
  return dynamic_cast<const LayerNorm*>(&module) == nullptr && !std::regex_search(name, spared);
}

}  // namespace

Trainer::Trainer(VisionLanguageModel& model, const Family& family, std::string model_dir, const TrainOptions& options,
                 at::ScalarType dtype, at::Device device)
    : model_(model),
      family_(family),
      model_dir_(std::move(model_dir)),
      options_(options),
      dtype_(dtype),
      device_(device) {
  const at::NoGradGuard no_grad;
  std::vector<TrainedParameter> trained;
  const auto add = [&](const std::string& name, const std::string& module_path, at::Tensor* slot, bool decay) {
    trained.push_back({name, slot, decay});
    const Part part = model_.part_of(module_path);
    (part == Part::kVision      ? trainable_.vision
     : part == Part::kProjector ? trainable_.projector
                                : trainable_.language) += slot->numel();
  };
  if (options_.full) {
    model_.visit([&](const std::string& path, Module& module) {
      for (Parameter* parameter : module.own_parameters()) {
        const std::string name = join_path(path, parameter->name);
        if (parameter->fixed || options_.freeze.frozen(model_.part_of(name))) continue;
        add(name, name, &parameter->value, is_decayed(module, name));
      }
    });
    if (trained.empty())
      fail(code::kConfig, "Nothing is left to train: freeze_vit, freeze_aligner and freeze_llm are all true.");
  } else {
    if (!options_.adapter_dir.empty()) {
      const nlohmann::json config = read_json_file(std::filesystem::path(model_dir_) / "config.json");
      adapter_ = attach_adapter(
          model_, read_adapter(options_.adapter_dir, family_.canonical_key),
          [&](const std::string& key) { return family_.is_unused_key(config, key); }, at::kFloat, device_,
          options_.adapter_dir);
      for (auto& [path, layer] : adapter_.layers) layer.dropout = options_.lora.lora_dropout;
      adapter_.config.lora_dropout = options_.lora.lora_dropout;
    } else {
      targets_ = select_targets(model_, options_.target_names, options_.target_regex, options_.freeze);
      adapter_ = create_adapter(targets_, options_.lora, options_.seed, device_);
    }
    for (auto& [path, layer] : adapter_.layers) {
      add(path + ".lora_A.weight", path, &layer.a, true);
      add(path + ".lora_B.weight", path, &layer.b, true);
    }
    activate(model_, &adapter_);
  }
  parameters_ = std::make_unique<FlatParameters>(std::move(trained), dtype_, device_);
  dropout_.generator = make_generator(device_);
}

Trainer::~Trainer() {
  parameters_.reset();  // the network's slots keep plain values
  if (!options_.full) activate(model_, nullptr);
}

std::optional<Adapter> Trainer::release_adapter() {
  if (options_.full) return std::nullopt;
  parameters_.reset();
  activate(model_, nullptr);
  for (auto& [path, layer] : adapter_.layers) layer.dropout = 0;
  return std::move(adapter_);
}

StepResult Trainer::run(const std::vector<MicroBatch>& micro_batches, bool train, JobContext& job) {
  StepResult result;
  int64_t labelled = 0;
  for (const MicroBatch& micro : micro_batches) {
    for (const Sample& sample : micro) labelled += count_labelled(sample);
  }
  if (labelled == 0) fail(code::kConfig, "No token of this batch is labelled: there is nothing to learn from it.");
  const bool vision_trains = train && (trainable_.vision > 0 || trainable_.projector > 0);
  const double scale = 1.0 / static_cast<double>(labelled);

  at::AutoGradMode grad_mode(train);
  at::Tensor loss_sum = at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device_));
  at::Tensor correct = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(device_));
  int64_t done = 0;
  for (const MicroBatch& micro : micro_batches) {
    job.check();
    std::vector<const Sample*> samples;
    for (const Sample& sample : micro) samples.push_back(&sample);
    const PackedBatch batch = pack(samples, model_, device_);
    result.tokens += batch.tokens;
    if (batch.labelled > 0) {
      dropout_.seed = mix_seed(mix_seed(options_.seed, static_cast<uint64_t>(step_)), static_cast<uint64_t>(done));
      ForwardOptions options;
      options.dropout = train ? &dropout_ : nullptr;
      options.recompute = train && options_.recompute;
      options.training = train;
      options.job = &job;
      DecoderInput input = embed(model_, batch, options, vision_trains);  // outlives the backward pass
      // Recomputed layers need an input that requires grad even where nothing before them is trained.
      if (options.recompute && !input.hidden.requires_grad()) input.hidden.requires_grad_(true);
      const at::Tensor hidden = model_.decoder().forward(input.hidden, input.pass);
      const at::Tensor selected = model_.decoder().norm.forward(hidden.index_select(0, batch.predict_rows));
      const LossOutput loss = chunked_cross_entropy(selected, model_.head_weight(), batch.targets, scale);
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
  result.loss = loss_sum.item<double>();
  result.correct = correct.item<int64_t>();
  return result;
}

StepResult Trainer::step(const std::vector<MicroBatch>& micro_batches, JobContext& job) {
  if (!parameters_) fail(code::kInternal, "This training run has ended.");
  parameters_->zero_grad();
  StepResult result = run(micro_batches, /*train=*/true, job);
  const at::NoGradGuard no_grad;
  const at::Tensor norm = parameters_->grad_norm();
  result.grad_norm = norm.item<double>();
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    std::vector<std::string> ids;
    for (const MicroBatch& micro : micro_batches) {
      for (const Sample& sample : micro) ids.push_back(sample.id);
    }
    fail(code::kNonFinite,
         "Step " + std::to_string(step_ + 1) + ": the " + (std::isfinite(result.loss) ? "gradient norm" : "loss") +
             " is not finite; the weights were not changed. Lower the learning rate, use bfloat16 or float32, or look "
             "at the rows named.",
         {{"step", step_ + 1}, {"samples", ids}});
  }
  job.check();
  if (options_.max_grad_norm > 0) {
    // As torch.nn.utils.clip_grad_norm_.
    parameters_->scale_grad((options_.max_grad_norm / (norm + 1e-6)).clamp_max(1.0));
  }
  result.learning_rate = options_.learning_rate * options_.schedule.factor(step_);
  parameters_->adamw_step(result.learning_rate, options_.optimizer);
  result.step = ++step_;
  return result;
}

StepResult Trainer::evaluate(const std::vector<MicroBatch>& micro_batches, JobContext& job) {
  StepResult result = run(micro_batches, /*train=*/false, job);
  result.step = step_;
  return result;
}

std::vector<std::pair<std::string, at::Tensor>> Trainer::gradients(const std::vector<MicroBatch>& micro_batches,
                                                                   JobContext& job, double& loss) {
  parameters_->zero_grad();
  loss = run(micro_batches, /*train=*/true, job).loss;
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
  for (size_t i = 0; i < parameters.size(); ++i) {
    const std::string& name = parameters[i].name;
    const size_t cut = name.rfind(".lora_");
    auto& pair = weights.pairs[name.substr(0, cut)];
    (name[cut + 6] == 'A' ? pair.first : pair.second) = parameters_->master_view(i).detach();
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
  write_safetensors(path.string(), parameters_->state(), {{"format", "pt"}, {"step", std::to_string(step_)}});
  return {kStateFile};
}

int64_t Trainer::load_state(const std::string& dir) {
  const auto path = std::filesystem::path(dir) / kStateFile;
  const auto file = SafetensorsFile::open(path.string());
  std::vector<std::pair<std::string, at::Tensor>> state;
  for (const TensorInfo& info : file->tensors()) state.emplace_back(info.name, file->tensor(info.name));
  parameters_->load_state(state);
  const auto it = file->metadata().find("step");
  if (it == file->metadata().end())
    fail(code::kIo, path.string() + " does not say at which step it was written.", {{"path", path.string()}});
  step_ = std::atoll(it->second.c_str());
  return step_;
}

}  // namespace martlet
