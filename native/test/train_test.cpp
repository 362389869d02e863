#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <memory>
#include <numbers>

#include "check.h"
#include "core/base/rng.h"
#include "core/train/flat_parameters.h"
#include "core/train/loss.h"
#include "core/train/lr_schedule.h"

using namespace martlet;
using namespace martlet::test;

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

  void update(const at::Tensor& grad, double rate, const AdamWOptions& o, double weight_decay) {
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
    return {{"first", &first, true}, {"bias", &bias, false}, {"second", &second, true}};
  }
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

TEST("FlatParameters: AdamW over several steps is the formula, decay only where asked for") {
  Slots slots;
  std::vector<PlainAdamW> plain;
  FlatParameters flat(slots.parameters(), at::kFloat, at::kCPU);
  EXPECT_EQ(flat.size(), 12 + 5 + 6);
  AdamWOptions options;
  options.beta1 = 0.8;
  options.beta2 = 0.95;
  options.epsilon = 1e-3;
  options.weight_decay = 0.1;
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
      plain[i].update(2 * g, rate, options, p.decay ? options.weight_decay : 0.0);
    }
    flat.adamw_step(rate, options);
    for (size_t i = 0; i < plain.size(); ++i) {
      EXPECT_CLOSE(*flat.parameters()[i].slot, plain[i].value, 1e-6);
      EXPECT_CLOSE(flat.master_view(i), plain[i].value, 1e-6);
    }
  }
}

TEST("FlatParameters: the norm is over all gradients, and clipping scales each of them") {
  Slots slots;
  FlatParameters flat(slots.parameters(), at::kFloat, at::kCPU);
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
  FlatParameters flat({{"w", &value, false}}, at::kBFloat16, at::kCPU);
  EXPECT_EQ(value.scalar_type(), at::kBFloat16);
  for (int i = 0; i < 512; ++i) {
    torch::autograd::backward({value.sum()});
    flat.collect_micro_batch();
  }
  // A bfloat16 sum of ones stands still at 256.
  EXPECT_CLOSE(flat.grad_view(0), at::full({4}, 512.0, at::kFloat), 0);
  // With a constant gradient AdamW steps by the learning rate; 1e-4 is less than half a bfloat16 unit at 1.
  for (int i = 0; i < 3; ++i) flat.adamw_step(1e-4, {});
  EXPECT_CLOSE(flat.master_view(0), at::full({4}, 1 - 3e-4, at::kDouble), 1e-6);
  EXPECT_CLOSE(value, at::ones({4}), 0);
  for (int i = 0; i < 97; ++i) flat.adamw_step(1e-4, {});
  EXPECT_SAME(value.detach(), flat.master_view(0).to(at::kBFloat16));
  EXPECT(value[0].item<double>() < 1);
  flat.zero_grad();
  EXPECT_EQ(flat.grad_norm().item<double>(), 0.0);
}

TEST("FlatParameters: slots keep their values when the run ends, without gradients") {
  Slots slots;
  const at::Tensor before = slots.first.clone();
  {
    FlatParameters flat(slots.parameters(), at::kFloat, at::kCPU);
    EXPECT(slots.first.requires_grad() && slots.first.is_leaf());
    EXPECT_SAME(slots.first.detach(), before);
  }
  EXPECT(!slots.first.requires_grad());
  EXPECT_SAME(slots.first, before);
}

TEST("FlatParameters: a run that loads the state goes on to the bit") {
  const auto step = [](FlatParameters& flat, int number) {
    flat.zero_grad();
    for (size_t i = 0; i < flat.parameters().size(); ++i) {
      const at::Tensor& slot = *flat.parameters()[i].slot;
      torch::autograd::backward({(slot * randn(slot.sizes(), 10 * number + i)).sum()});
    }
    flat.adamw_step(0.01, {});
  };
  Slots straight, resumed;
  FlatParameters one(straight.parameters(), at::kFloat, at::kCPU);
  step(one, 1);
  step(one, 2);
  std::vector<std::pair<std::string, at::Tensor>> saved;
  for (const auto& [name, tensor] : one.state()) saved.emplace_back(name, tensor.clone());
  step(one, 3);

  for (at::Tensor* slot : {&resumed.first, &resumed.bias, &resumed.second}) slot->zero_();
  FlatParameters two(resumed.parameters(), at::kFloat, at::kCPU);
  two.load_state(saved);
  step(two, 3);
  EXPECT_SAME(resumed.first.detach(), straight.first.detach());
  EXPECT_SAME(resumed.bias.detach(), straight.bias.detach());

  saved[0].second = at::zeros({3}, at::kFloat);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kIo, two.load_state(saved)).what(), "master");
  saved.erase(saved.begin(), saved.begin() + 1);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kIo, two.load_state(saved)).what(), "master");
}

TEST("learning rates: transformers' schedules, with warm-up") {
  constexpr int64_t kWarmup = 5, kTotal = 25;
  for (int64_t step = 0; step <= kTotal + 3; ++step) {
    const double s = static_cast<double>(step);
    const bool warming = step < kWarmup;
    const double linear = warming ? s / 5 : std::max(0.0, (25 - s) / 20);
    const double progress = (s - 5) / 20;
    const double cosine = warming ? s / 5 : std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress)));
    EXPECT_CLOSE((LrSchedule{LrSchedule::parse("linear"), kWarmup, kTotal}.factor(step)), linear, 1e-12);
    EXPECT_CLOSE((LrSchedule{LrSchedule::parse("cosine"), kWarmup, kTotal}.factor(step)), cosine, 1e-12);
    EXPECT_CLOSE((LrSchedule{LrSchedule::parse("constant"), kWarmup, kTotal}.factor(step)), 1.0, 0);
    EXPECT_CLOSE((LrSchedule{LrSchedule::parse("constant_with_warmup"), kWarmup, kTotal}.factor(step)),
                 warming ? s / 5 : 1.0, 1e-12);
  }
}

TEST("learning rates: known points, without warm-up and with nothing but warm-up") {
  const LrSchedule cosine{LrSchedule::Type::kCosine, 0, 100};
  EXPECT_CLOSE(cosine.factor(0), 1.0, 0);
  EXPECT_CLOSE(cosine.factor(25), 0.85355339059327373, 1e-12);
  EXPECT_CLOSE(cosine.factor(50), 0.5, 1e-12);
  EXPECT_CLOSE(cosine.factor(100), 0.0, 1e-12);
  const LrSchedule linear{LrSchedule::Type::kLinear, 0, 4};
  EXPECT_CLOSE(linear.factor(1), 0.75, 0);
  EXPECT_CLOSE(linear.factor(4), 0.0, 0);
  const LrSchedule warm{LrSchedule::Type::kLinear, 10, 10};
  EXPECT_CLOSE(warm.factor(9), 0.9, 1e-12);
  EXPECT_CLOSE(warm.factor(10), 0.0, 0);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kConfig, LrSchedule::parse("polynomial")).what(), "polynomial");
}
