#include "core/train/train_options.h"

#include <nlohmann/json.hpp>

#include "core/base/dtype.h"
#include "core/base/error.h"

namespace martlet {
namespace {

using nlohmann::json;

template <typename T>
std::optional<T> optional(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return std::nullopt;
  return it->get<T>();
}

OptimizerOptions parse_optimizer(const json& o) {
  OptimizerOptions options;
  const std::string name = o.at("name").get<std::string>();
  if (name == "adamw_8bit") {
    options.type = OptimizerOptions::Type::kAdamW8bit;
  } else if (name == "sgd") {
    options.type = OptimizerOptions::Type::kSgd;
  } else if (name == "adafactor") {
    options.type = OptimizerOptions::Type::kAdafactor;
  } else if (name != "adamw") {
    fail(code::kConfig, "The optimiser \"" + name + "\" is not known; use adamw, adamw_8bit, sgd or adafactor.");
  }
  options.paged = o.value("paged", false);
  options.beta1 = o.at("beta1").get<double>();
  options.beta2 = o.at("beta2").get<double>();
  options.epsilon = o.at("epsilon").get<double>();
  options.momentum = o.value("momentum", 0.0);
  options.nesterov = o.value("nesterov", false);
  return options;
}

LrSchedule parse_schedule(const json& s) {
  LrSchedule schedule;
  schedule.type = LrSchedule::parse(s.at("type").get<std::string>());
  schedule.warmup_steps = s.at("warmupSteps").get<int64_t>();
  schedule.total_steps = s.at("totalSteps").get<int64_t>();
  schedule.num_cycles = optional<double>(s, "numCycles");
  schedule.min_lr_rate = s.value("minLrRate", 0.0);
  schedule.end_rate = s.value("endRate", 0.0);
  schedule.power = s.value("power", 1.0);
  schedule.timescale = optional<int64_t>(s, "timescale");
  return schedule;
}

Recompute parse_recompute(const std::string& level) {
  if (level == "none") return Recompute::kNone;
  if (level == "cheap") return Recompute::kCheap;
  if (level == "mlp") return Recompute::kMlp;
  if (level == "layer") return Recompute::kLayer;
  fail(code::kConfig, "gradient_checkpointing \"" + level + "\" is not known; use none, cheap, mlp or layer.");
}

void parse_lora(const json& lora, TrainOptions& options) {
  options.lora.r = lora.at("r").get<int64_t>();
  options.lora.lora_alpha = lora.at("alpha").get<double>();
  options.lora.lora_dropout = lora.at("dropout").get<double>();
  options.lora.use_rslora = lora.value("useRslora", false);
  options.lora.use_dora = lora.value("useDora", false);
  options.lora.bias = lora.value("bias", "none");
  options.init = LoraInit::parse(lora.value("initWeights", "true"));
  if (const auto dtype = optional<std::string>(lora, "dtype")) options.lora_dtype = parse_dtype(*dtype);
  options.saved.modules_to_save = lora.value("modulesToSave", std::vector<std::string>{});
  options.saved.vision_and_projector = lora.value("fullVisionAndProjector", false);
  const json& targets = lora.at("targetModules");
  if (targets.is_string() && targets != "all-linear") {
    options.target_regex = targets.get<std::string>();
  } else {
    options.target_names =
        targets.is_string() ? std::vector<std::string>{"all-linear"} : targets.get<std::vector<std::string>>();
  }
}

}  // namespace

TrainOptions parse_train_options(const json& args) {
  TrainOptions options;
  options.full = args.at("method") == "full";
  if (!options.full) {
    parse_lora(args.at("lora"), options);
    options.adapter_dir = args.value("adapterDir", "");
  }
  const json& freeze = args.at("freeze");
  options.freeze = {freeze.at("vision").get<bool>(), freeze.at("projector").get<bool>(),
                    freeze.at("language").get<bool>()};
  if (const auto it = args.find("parameters"); it != args.end()) {
    ParameterRules& rules = options.saved.rules;
    rules.trainable = it->value("trainable", std::vector<std::string>{});
    rules.trainable_regex = it->value("trainableRegex", "");
    rules.frozen = it->value("frozen", std::vector<std::string>{});
    rules.frozen_regex = it->value("frozenRegex", "");
    rules.frozen_ratio = it->value("frozenRatio", 0.0);
  }
  options.optimizer = parse_optimizer(args.at("optimizer"));
  options.rates = {args.at("learningRate").get<double>(), args.at("optimizer").at("weightDecay").get<double>(),
                   optional<double>(args, "vitLearningRate"), optional<double>(args, "alignerLearningRate"),
                   optional<double>(args, "loraPlusRatio")};
  options.schedule = parse_schedule(args.at("schedule"));
  options.max_grad_norm = args.at("maxGradNorm").get<double>();
  options.dropout = optional<double>(args, "dropout");
  options.neftune_alpha = args.value("neftuneNoiseAlpha", 0.0);
  options.label_smoothing = args.value("labelSmoothing", 0.0);
  options.recompute = parse_recompute(args.at("recompute").get<std::string>());
  options.vision_recompute = args.value("visionRecompute", options.recompute != Recompute::kNone);
  options.seed = args.at("seed").get<uint64_t>();
  return options;
}

}  // namespace martlet
