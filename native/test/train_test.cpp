#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/base/json.h"
#include "core/base/rng.h"
#include "core/io/safetensors.h"
#include "core/train/flat_parameters.h"
#include "core/train/loss.h"
#include "core/train/loss_scaler.h"
#include "core/train/lr_schedule.h"
#include "core/train/optimizer.h"
#include "core/train/parameter_selection.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

at::Tensor leaf(const at::Tensor& value) { return value.detach().clone().requires_grad_(true); }

struct LossCase {
  at::Tensor hidden, weight, targets;
};

LossCase loss_case(int64_t rows, int64_t width, int64_t vocab) {
  at::Generator generator = make_generator(at::kCPU);
  generator.set_current_seed(7);
  return {leaf(randn({rows, width}, 1)), leaf(randn({vocab, width}, 2) * 0.3),
          at::randint(vocab, {rows}, generator, at::TensorOptions().dtype(at::kLong))};
}

// AdamW as in Loshchilov & Hutter 2019, algorithm 2, in float64 (the decay is not scaled by the gradient's moments).
struct PlainAdamW {
  at::Tensor value, m, v;
  int step = 0;

  explicit PlainAdamW(const at::Tensor& start)
      : value(start.detach().to(at::kDouble, false, true)), m(at::zeros_like(value)), v(at::zeros_like(value)) {}

  void update(const at::Tensor& grad, double rate, const OptimizerOptions& o, double weight_decay) {
    ++step;
    const at::Tensor g = grad.to(at::kDouble);
    value = value * (1 - rate * weight_decay);
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    const at::Tensor m_hat = m / (1 - std::pow(o.beta1, step)), v_hat = v / (1 - std::pow(o.beta2, step));
    value = value - rate * m_hat / (v_hat.sqrt() + o.epsilon);
  }
};

// A bias without decay between two matrices with decay.
struct Slots {
  at::Tensor first = randn({3, 4}, 1), bias = randn({5}, 2), second = randn({2, 3}, 3);

  std::vector<TrainedParameter> parameters() {
    return {{"first", &first, 0, at::kFloat}, {"bias", &bias, 1, at::kFloat}, {"second", &second, 0, at::kFloat}};
  }
  // Group 1 has no decay, and half the rate.
  static std::vector<ParameterGroup> groups(double decay) { return {{1.0, decay}, {0.5, 0.0}}; }
};

}  // namespace

TEST("chunked cross-entropy is cross_entropy_loss, value and gradients") {
  LossCase c = loss_case(37, 16, 50);
  const at::Tensor plain =
      at::cross_entropy_loss(at::matmul(c.hidden, c.weight.t()), c.targets, {}, at::Reduction::Sum);
  const double scale = 1.0 / 37;
  const LossOutput own = chunked_cross_entropy(c.hidden, c.weight, c.targets, scale);
  EXPECT_CLOSE(own.loss, plain * scale, 1e-5);
  // The factor 3: the gradient that comes in need not be 1.
  const auto expected = torch::autograd::grad({plain * scale * 3}, {c.hidden, c.weight});
  const auto grads = torch::autograd::grad({own.loss * 3}, {c.hidden, c.weight});
  EXPECT_CLOSE(grads[0], expected[0], 1e-6);
  EXPECT_CLOSE(grads[1], expected[1], 1e-6);
}

TEST("chunked cross-entropy over several chunks") {
  // 32 M logits a chunk: with a vocabulary of 2^20 a chunk has 32 rows, so 70 rows are three chunks.
  LossCase c = loss_case(70, 4, 1 << 20);
  const LossOutput own = chunked_cross_entropy(c.hidden, c.weight, c.targets, 0.5);
  const auto grads = torch::autograd::grad({own.loss}, {c.hidden, c.weight});
  at::Tensor dhidden, dweight, loss;
  {
    const at::NoGradGuard no_grad;
    const at::Tensor logits = at::matmul(c.hidden, c.weight.t());
    const at::Tensor log_softmax = logits.log_softmax(1);
    loss = -log_softmax.gather(1, c.targets.unsqueeze(1)).sum() * 0.5;
    at::Tensor dlogits = log_softmax.exp_();
    dlogits.scatter_add_(1, c.targets.unsqueeze(1), at::full({70, 1}, -1, at::kFloat)).mul_(0.5);
    dhidden = at::mm(dlogits, c.weight);
    dweight = at::mm(dlogits.t(), c.hidden);
  }
  EXPECT_CLOSE(own.loss, loss, 1e-4 * loss.item<double>());
  EXPECT_CLOSE(grads[0], dhidden, 1e-5);
  EXPECT_CLOSE(grads[1], dweight, 1e-5);
}

TEST("chunked cross-entropy: only the gradients that are asked for, and none in evaluation") {
  LossCase c = loss_case(5, 8, 20);
  const at::Tensor frozen = c.weight.detach();
  const LossOutput own = chunked_cross_entropy(c.hidden, frozen, c.targets, 1.0);
  torch::autograd::backward({own.loss});
  EXPECT(c.hidden.grad().defined());
  EXPECT(!frozen.grad().defined());
  EXPECT(!chunked_cross_entropy(c.hidden.detach(), frozen, c.targets, 1.0).loss.requires_grad());
}

TEST("chunked cross-entropy counts the targets that were most likely") {
  LossCase c = loss_case(40, 8, 6);
  const at::Tensor best = at::matmul(c.hidden, c.weight.t()).argmax(1);
  const int64_t expected = best.eq(c.targets).sum().item<int64_t>();
  EXPECT(expected > 0 && expected < 40);
  EXPECT_EQ(chunked_cross_entropy(c.hidden, c.weight, c.targets, 1.0).correct.item<int64_t>(), expected);
  EXPECT_EQ(chunked_cross_entropy(c.hidden, c.weight, best, 1.0).correct.item<int64_t>(), 40);
}

TEST("chunked cross-entropy in bfloat16: logits rounded to bfloat16, softmax in float32") {
  LossCase c = loss_case(33, 16, 50);
  const at::Tensor hidden = leaf(c.hidden.detach().to(at::kBFloat16));
  const at::Tensor weight = leaf(c.weight.detach().to(at::kBFloat16));
  const at::Tensor logits = at::matmul(hidden, weight.t()).to(at::kFloat);
  const at::Tensor plain = at::cross_entropy_loss(logits, c.targets, {}, at::Reduction::Sum) / 33;
  const LossOutput own = chunked_cross_entropy(hidden, weight, c.targets, 1.0 / 33);
  EXPECT_EQ(own.loss.scalar_type(), at::kFloat);
  EXPECT_CLOSE(own.loss, plain, 1e-5);
  const auto expected = torch::autograd::grad({plain}, {hidden, weight});
  const auto grads = torch::autograd::grad({own.loss}, {hidden, weight});
  // Two bfloat16 units of the largest gradient.
  EXPECT_CLOSE(grads[0], expected[0], 0.008 * expected[0].abs().max().item<double>());
  EXPECT_CLOSE(grads[1], expected[1], 0.008 * expected[1].abs().max().item<double>());
}

TEST("target_logprobs is log_softmax at the targets") {
  LossCase c = loss_case(9, 8, 30);
  const at::Tensor logits = at::matmul(c.hidden, c.weight.t()).to(at::kDouble).detach();
  EXPECT_CLOSE(target_logprobs(c.hidden.detach(), c.weight.detach(), c.targets),
               logits.log_softmax(1).gather(1, c.targets.unsqueeze(1)).squeeze(1), 1e-5);
}

TEST("FlatParameters: AdamW over several steps is the formula, each group with its rate and decay") {
  Slots slots;
  std::vector<PlainAdamW> plain;
  FlatParameters flat(slots.parameters(), Slots::groups(0.1), at::kCPU);
  EXPECT_EQ(flat.size(), 12 + 5 + 6);
  OptimizerOptions options;
  options.beta1 = 0.8;
  options.beta2 = 0.95;
  options.epsilon = 1e-3;
  const auto optimizer = make_optimizer(options, flat);
  for (const TrainedParameter& p : flat.parameters()) plain.emplace_back(*p.slot);
  for (int step = 0; step < 5; ++step) {
    const double rate = 0.05 / (step + 1);
    flat.zero_grad();
    for (size_t i = 0; i < plain.size(); ++i) {
      const TrainedParameter& p = flat.parameters()[i];
      const at::Tensor g = randn(p.slot->sizes(), 100 + 10 * step + i);
      // Through autograd, twice: gradients add up in the flat buffer.
      torch::autograd::backward({(*p.slot * g).sum()});
      torch::autograd::backward({(*p.slot * g).sum()});
      EXPECT_CLOSE(flat.grad_view(i), 2 * g, 0);
      plain[i].update(2 * g, p.group == 0 ? rate : rate / 2, options, p.group == 0 ? 0.1 : 0.0);
    }
    optimizer->step(rate);
    for (size_t i = 0; i < plain.size(); ++i) {
      EXPECT_CLOSE(*flat.parameters()[i].slot, plain[i].value, 1e-6);
      EXPECT_CLOSE(flat.master_view(i), plain[i].value, 1e-6);
    }
  }
}

TEST("FlatParameters: the norm is over all gradients, and clipping scales each of them") {
  Slots slots;
  FlatParameters flat(slots.parameters(), Slots::groups(0), at::kCPU);
  double squares = 0;
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < flat.parameters().size(); ++i) {
    const at::Tensor& slot = *flat.parameters()[i].slot;
    grads.push_back(randn(slot.sizes(), 50 + i));
    torch::autograd::backward({(slot * grads[i]).sum()});
    squares += grads[i].to(at::kDouble).pow(2).sum().item<double>();
  }
  const at::Tensor norm = flat.grad_norm();
  EXPECT_CLOSE(norm.item<double>(), std::sqrt(squares), 1e-5);
  flat.scale_grad(0.5 / norm);
  EXPECT_CLOSE(flat.grad_norm().item<double>(), 0.5, 1e-6);
  for (size_t i = 0; i < grads.size(); ++i) {
    EXPECT_CLOSE(flat.grad_view(i), grads[i].to(at::kDouble) * 0.5 / std::sqrt(squares), 1e-6);
  }
}

TEST("FlatParameters in bfloat16: gradients of micro-batches add up in float32, the master keeps small steps") {
  at::Tensor value = at::ones({4}, at::kBFloat16);
  FlatParameters flat({{"w", &value, 0, at::kBFloat16}}, {{1.0, 0.0}}, at::kCPU);
  const auto optimizer = make_optimizer({}, flat);
  EXPECT_EQ(value.scalar_type(), at::kBFloat16);
  for (int i = 0; i < 512; ++i) {
    torch::autograd::backward({value.sum()});
    flat.collect_micro_batch();
  }
  // A bfloat16 sum of ones stands still at 256.
  EXPECT_CLOSE(flat.grad_view(0), at::full({4}, 512.0, at::kFloat), 0);
  // With a constant gradient AdamW steps by the learning rate; 1e-4 is less than half a bfloat16 unit at 1.
  for (int i = 0; i < 3; ++i) optimizer->step(1e-4);
  EXPECT_CLOSE(flat.master_view(0), at::full({4}, 1 - 3e-4, at::kDouble), 1e-6);
  EXPECT_CLOSE(value, at::ones({4}), 0);
  for (int i = 0; i < 97; ++i) optimizer->step(1e-4);
  EXPECT_SAME(value.detach(), flat.master_view(0).to(at::kBFloat16));
  EXPECT(value[0].item<double>() < 1);
  flat.zero_grad();
  EXPECT_EQ(flat.grad_norm().item<double>(), 0.0);
}

TEST("FlatParameters: slots keep their values when the run ends, without gradients") {
  Slots slots;
  const at::Tensor before = slots.first.clone();
  {
    FlatParameters flat(slots.parameters(), Slots::groups(0), at::kCPU);
    EXPECT(slots.first.requires_grad() && slots.first.is_leaf());
    EXPECT_SAME(slots.first.detach(), before);
  }
  EXPECT(!slots.first.requires_grad());
  EXPECT_SAME(slots.first, before);
}

TEST("every optimiser: a run that loads its state goes on to the bit; a state of another run is refused") {
  using Type = OptimizerOptions::Type;
  const auto step = [](FlatParameters& flat, Optimizer& optimizer, int number) {
    flat.zero_grad();
    for (size_t i = 0; i < flat.parameters().size(); ++i) {
      const at::Tensor& slot = *flat.parameters()[i].slot;
      torch::autograd::backward({(slot * randn(slot.sizes(), 10 * number + i)).sum()});
    }
    optimizer.step(0.01);
  };
  for (const Type type : {Type::kAdamW, Type::kAdamW8bit, Type::kSgd, Type::kAdafactor}) {
    OptimizerOptions options;
    options.type = type;
    options.momentum = 0.9;
    Slots straight, resumed;
    // Large enough for 8-bit moments, with a short last block.
    straight.first = randn({70, 63}, 8);
    FlatParameters one(straight.parameters(), Slots::groups(0.1), at::kCPU);
    const auto optimizer = make_optimizer(options, one);
    step(one, *optimizer, 1);
    step(one, *optimizer, 2);
    NamedTensors saved = {{"master", one.master().clone()}};
    for (const auto& [name, tensor] : optimizer->state()) saved.emplace_back(name, tensor.clone());
    step(one, *optimizer, 3);

    resumed.first = at::zeros({70, 63}, at::kFloat);
    FlatParameters two(resumed.parameters(), Slots::groups(0.1), at::kCPU);
    const auto other = make_optimizer(options, two);
    two.master().copy_(saved[0].second);
    other->load_state(saved);
    step(two, *other, 3);
    EXPECT_SAME(resumed.first.detach(), straight.first.detach());
    EXPECT_SAME(resumed.bias.detach(), straight.bias.detach());

    const std::string name = saved.back().first;
    saved.back().second = at::zeros({3}, at::kFloat);
    EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kIo, other->load_state(saved)).what(), name);
    saved.pop_back();
    EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kIo, other->load_state(saved)).what(), name);
  }
}

TEST("learning rates: every schedule gives transformers' trace") {
  int traces = 0;
  const json file = read_json_file(fixtures() / "schedules.json");
  for (const json& c : file.at("cases")) {
    LrSchedule schedule;
    schedule.type = LrSchedule::parse(c.at("type").get<std::string>());
    schedule.warmup_steps = c.at("warmupSteps").get<int64_t>();
    schedule.total_steps = c.at("totalSteps").get<int64_t>();
    const json& k = c.at("kwargs");
    const double base = c.at("learningRate").get<double>();
    if (k.contains("num_cycles")) schedule.num_cycles = k["num_cycles"].get<double>();
    if (k.contains("timescale")) schedule.timescale = k["timescale"].get<int64_t>();
    schedule.min_lr_rate = k.contains("min_lr") ? k["min_lr"].get<double>() / base : k.value("min_lr_rate", 0.0);
    schedule.end_rate = k.value("lr_end", 1e-7) / base;
    schedule.power = k.value("power", 1.0);
    int64_t step = 0;
    for (const json& rate : c.at("rates")) EXPECT_CLOSE(base * schedule.factor(step++), rate.get<double>(), 1e-12);
    EXPECT(step > schedule.total_steps);
    ++traces;
  }
  EXPECT(traces >= 15);
}

TEST("learning rates: known points, without warm-up and with nothing but warm-up") {
  const auto schedule = [](LrSchedule::Type type, int64_t warmup, int64_t total) {
    LrSchedule s;
    s.type = type;
    s.warmup_steps = warmup;
    s.total_steps = total;
    return s;
  };
  const LrSchedule cosine = schedule(LrSchedule::Type::kCosine, 0, 100);
  EXPECT_CLOSE(cosine.factor(0), 1.0, 0);
  EXPECT_CLOSE(cosine.factor(25), 0.85355339059327373, 1e-12);
  EXPECT_CLOSE(cosine.factor(50), 0.5, 1e-12);
  EXPECT_CLOSE(cosine.factor(100), 0.0, 1e-12);
  const LrSchedule linear = schedule(LrSchedule::Type::kLinear, 0, 4);
  EXPECT_CLOSE(linear.factor(1), 0.75, 0);
  EXPECT_CLOSE(linear.factor(4), 0.0, 0);
  const LrSchedule warm = schedule(LrSchedule::Type::kLinear, 10, 10);
  EXPECT_CLOSE(warm.factor(9), 0.9, 1e-12);
  EXPECT_CLOSE(warm.factor(10), 0.0, 0);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kConfig, LrSchedule::parse("polynom")).what(), "polynomial");
}

TEST("optimisers: SGD, Adafactor and 8-bit AdamW follow torch, transformers and bitsandbytes") {
  using Type = OptimizerOptions::Type;
  const auto file = SafetensorsFile::open(fixtures() / "optimizers.safetensors");
  struct Case {
    const char* name;
    Type type;
    double momentum;
    bool nesterov;
    double tolerance;
  };
  for (const Case& c :
       {Case{"sgd", Type::kSgd, 0, false, 1e-6}, Case{"momentum", Type::kSgd, 0.9, false, 1e-6},
        Case{"nesterov", Type::kSgd, 0.9, true, 1e-6}, Case{"adafactor", Type::kAdafactor, 0, false, 1e-6},
        Case{"adamw_8bit", Type::kAdamW8bit, 0, false, 1e-6}}) {
    std::vector<std::string> names = {"matrix", "vector", "small"};
    std::vector<at::Tensor> slots;
    for (const std::string& name : names) slots.push_back(file->tensor("start." + name).clone());
    std::vector<TrainedParameter> parameters;
    for (size_t i = 0; i < names.size(); ++i) parameters.push_back({names[i], &slots[i], i, at::kFloat});
    FlatParameters flat(parameters, {{0.01, 0.1}, {0.01, 0.0}, {0.02, 0.1}}, at::kCPU);
    OptimizerOptions options;
    options.type = c.type;
    options.momentum = c.momentum;
    options.nesterov = c.nesterov;
    options.beta2 = 0.95;
    const auto optimizer = make_optimizer(options, flat);
    for (int step = 0; step < 4; ++step) {
      for (size_t i = 0; i < names.size(); ++i)
        flat.grad_view(i).copy_(file->tensor("grad." + std::to_string(step) + "." + names[i]));
      optimizer->step(step % 2 == 0 ? 1.0 : 0.5);
      for (size_t i = 0; i < names.size(); ++i) {
        EXPECT_CLOSE(flat.master_view(i),
                     file->tensor(std::string(c.name) + "." + std::to_string(step) + "." + names[i]), c.tolerance);
      }
    }
    if (c.type != Type::kAdamW8bit) continue;
    // Codes of the moments, not only what they lead to.
    for (const auto& [name, tensor] : optimizer->state()) {
      if (name.find(".codes") == std::string::npos) continue;
      const at::Tensor expected = at::cat(
          {file->tensor("adamw_8bit." + name + ".matrix").view(-1), file->tensor("adamw_8bit." + name + ".vector")});
      const int64_t differing = tensor.ne(expected).sum().item<int64_t>();
      EXPECT(differing * 1000 <= tensor.numel());
    }
  }
}

TEST("label smoothing is transformers' formula, value and gradients") {
  LossCase c = loss_case(23, 8, 30);
  const double epsilon = 0.1;
  const at::Tensor log_probs = at::matmul(c.hidden, c.weight.t()).log_softmax(1);
  const at::Tensor plain =
      (-(1 - epsilon) * log_probs.gather(1, c.targets.unsqueeze(1)).sum() - epsilon * log_probs.mean(1).sum()) / 23;
  const LossOutput own = chunked_cross_entropy(c.hidden, c.weight, c.targets, 1.0 / 23, epsilon);
  EXPECT_CLOSE(own.loss, plain, 1e-5);
  const auto expected = torch::autograd::grad({plain}, {c.hidden, c.weight});
  const auto grads = torch::autograd::grad({own.loss}, {c.hidden, c.weight});
  EXPECT_CLOSE(grads[0], expected[0], 1e-6);
  EXPECT_CLOSE(grads[1], expected[1], 1e-6);
}

TEST("weight decay: transformers' names") {
  for (const char* name :
       {"model.layers.0.q_proj.lora_A.weight", "lm_head.weight", "a.normal.weight", "merger.ln_q.weight"})
    EXPECT(is_decayed(name, false));
  for (const char* name : {"a.bias", "a.input_layernorm.weight", "model.norm.weight", "a.q_norm.weight", "norm.weight",
                           "a.RMSNorm.weight", "a.post_norm"})
    EXPECT(!is_decayed(name, false));
  EXPECT(!is_decayed("model.vision_tower.layer_norm1.weight", true));
}

TEST("groups: a rate for each part, LoRA+ for B, none twice") {
  GroupBuilder groups({1e-4, 0.1, 1e-5, {}, 16.0});
  EXPECT_EQ(groups.group(Part::kLanguage, true, false), 0u);
  EXPECT_EQ(groups.group(Part::kProjector, true, false), 0u);
  EXPECT_EQ(groups.group(Part::kVision, true, false), 1u);
  EXPECT_EQ(groups.group(Part::kLanguage, true, true), 2u);
  EXPECT_EQ(groups.group(Part::kVision, false, true), 3u);
  EXPECT_EQ(groups.group(Part::kVision, true, false), 1u);
  EXPECT_CLOSE(groups.groups()[1].learning_rate, 1e-5, 0);
  EXPECT_CLOSE(groups.groups()[2].learning_rate, 16e-4, 1e-18);
  EXPECT_CLOSE(groups.groups()[3].learning_rate, 16e-5, 1e-18);
  EXPECT_CLOSE(groups.groups()[3].weight_decay, 0.0, 0);
}

TEST("loss scaling: torch's GradScaler rules") {
  LossScaler off(false), scaler(true);
  off.update(true);
  EXPECT_EQ(off.scale(), 1.0);
  EXPECT_EQ(scaler.scale(), 65536.0);
  scaler.update(true);
  EXPECT_EQ(scaler.scale(), 32768.0);
  for (int i = 0; i < 1999; ++i) scaler.update(false);
  EXPECT_EQ(scaler.scale(), 32768.0);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 65536.0);
}
