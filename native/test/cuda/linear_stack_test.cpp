// A stack of linears with pairs on the GPU, forward and backward, beside float64 on the CPU.
#include "core/lora/linear_stack.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>

#include "check.h"
#include "core/base/rng.h"
#include "core/quant/fp8.h"
#include "cuda/gpu.h"

using namespace martlet;
using namespace martlet::test;

namespace {

struct Stack {
  std::vector<int64_t> outs;
  int64_t in, rank;
  std::vector<bool> paired;
};

// Linears of one input with pairs in bfloat16; their weights are the test's to give.
struct Linears {
  explicit Linears(const Stack& s) {
    uint64_t seed = 50;
    const auto drawn = [&](at::IntArrayRef shape) { return randn(shape, seed++).to(at::kBFloat16).to(gpu()); };
    for (size_t i = 0; i < s.outs.size(); ++i) {
      linears.push_back(std::make_unique<Linear>(s.in, s.outs[i], false));
      pairs.push_back(std::make_unique<LoraLayer>());
      pairs[i]->a = drawn({s.rank, s.in}).requires_grad_(true);
      pairs[i]->b = drawn({s.outs[i], s.rank}).requires_grad_(true);
      pairs[i]->scaling = 0.75;
      if (s.paired[i]) linears[i]->lora = pairs[i].get();
      all.push_back(linears[i].get());
    }
  }
  static at::Tensor weight(const Linear& linear, uint64_t seed) {
    return (0.2 * randn({linear.out_features(), linear.in_features()}, seed)).to(at::kBFloat16).to(gpu());
  }
  // Gradients are there, and are added to.
  void begin_gradients() {
    for (const auto& pair : pairs) {
      pair->a.mutable_grad() = at::ones_like(pair->a);
      pair->b.mutable_grad() = at::ones_like(pair->b);
    }
  }

  std::vector<std::unique_ptr<Linear>> linears;
  std::vector<std::unique_ptr<LoraLayer>> pairs;
  std::vector<Linear*> all;
};

double away(const at::Tensor& a, const at::Tensor& expected) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = expected.cpu().to(at::kDouble);
  return ((x - y).abs().max() / y.abs().max()).item<double>();
}

}  // namespace

TEST("augmented: outputs and gradients, of ranks that the kernel takes and of others; the same bits twice") {
  for (const Stack& s :
       {Stack{{40, 16, 136}, 24, 8, {true, true, true}}, Stack{{1032, 8}, 64, 16, {true, true}},
        Stack{{264, 2200}, 72, 8, {false, true}}, Stack{{128}, 40, 8, {true}}, Stack{{1024, 1024}, 64, 8, {true, true}},
        Stack{{24, 64}, 32, 4, {true, true}}, Stack{{24, 64}, 32, 32, {true, true}}}) {
    for (const int64_t rows : {1, 17, 64, 300, 5000}) {
      const auto type = at::kBFloat16;
      Linears own(s);
      auto& [linears, pairs, all] = own;
      uint64_t seed = 1;
      for (Linear* linear : all) linear->weight.value = Linears::weight(*linear, seed++);
      const at::Tensor weights = [&] {
        std::vector<at::Tensor> parts;
        for (size_t i = 0; i < s.outs.size(); ++i) {
          at::Tensor w = linears[i]->weight.value.cpu().to(at::kDouble);
          if (s.paired[i])
            w = w +
                0.75 * at::mm(pairs[i]->b.detach().cpu().to(at::kDouble), pairs[i]->a.detach().cpu().to(at::kDouble));
          parts.push_back(w);
        }
        return at::cat(parts);
      }();
      stack_weights(all, PairForm::kAugmented);
      const auto stack = LinearStack::of({all.begin(), all.end()}, type, nullptr);
      EXPECT(stack->form() == PairForm::kAugmented);
      stack->refresh_pairs();
      const int64_t out = weights.size(0);
      const at::Tensor x = randn({rows, s.in}, 100).to(type), dy = randn({rows, out}, 101).to(type);
      std::vector<at::Tensor> first;
      for (int time = 0; time < 2; ++time) {
        own.begin_gradients();
        const at::NoGradGuard no_grad;
        at::Tensor own_x = stack->empty_input(rows), own_dy = stack->empty_output(rows), low;
        own_x.copy_(x);
        const at::Tensor y = stack->forward(own_x, low, stack->empty_output(rows));
        own_dy.copy_(dy);
        const at::Tensor dx = stack->backward(own_dy, low);
        stack->backward_a(low, own_x);
        std::vector<at::Tensor> results = {y.clone(), dx};
        EXPECT(away(y, at::mm(x.to(at::kDouble), weights.t())) < 0.02);
        EXPECT(away(dx, at::mm(dy.to(at::kDouble), weights)) < 0.02);
        int64_t row = 0;
        for (size_t i = 0; i < s.outs.size(); ++i) {
          const at::Tensor part = dy.narrow(1, row, s.outs[i]).to(at::kDouble), in = x.to(at::kDouble);
          row += s.outs[i];
          if (!s.paired[i]) continue;
          const at::Tensor a = pairs[i]->a.detach().cpu().to(at::kDouble),
                           b = pairs[i]->b.detach().cpu().to(at::kDouble);
          EXPECT(away(pairs[i]->b.grad(), 1 + 0.75 * at::mm(part.t(), at::mm(in, a.t()))) < 0.02);
          EXPECT(away(pairs[i]->a.grad(), 1 + 0.75 * at::mm(at::mm(part, b).t(), in)) < 0.02);
          results.push_back(pairs[i]->a.grad());
          results.push_back(pairs[i]->b.grad());
        }
        if (time == 0) first = results;
        for (size_t i = 0; i < results.size(); ++i) EXPECT_SAME(results[i].cpu(), first[i].cpu());
      }
      // Without room beside x and dy.
      for (const auto& pair : pairs) {
        pair->a.mutable_grad() = at::ones_like(pair->a);
        pair->b.mutable_grad() = at::ones_like(pair->b);
      }
      const at::NoGradGuard no_grad;
      const at::Tensor own_x = x.to(gpu());
      at::Tensor low;
      std::vector<at::Tensor> results = {stack->forward(own_x, low)};
      results.push_back(stack->backward(dy.to(gpu()), low));
      stack->backward_a(low, own_x);
      for (size_t i = 0; i < pairs.size(); ++i) {
        if (!s.paired[i]) continue;
        results.push_back(pairs[i]->a.grad());
        results.push_back(pairs[i]->b.grad());
      }
      for (size_t i = 0; i < results.size(); ++i) EXPECT(away(results[i], first[i]) < 0.02);
    }
  }
}

TEST("fp8 with the pairs after the codes: outputs and gradients, of ranks that the kernel takes and of others") {
  if (!has_fp8_products(gpu())) {
    std::printf("  not run: this GPU has no products in fp8\n");
    return;
  }
  for (const Stack& s : {Stack{{48, 16, 144}, 32, 8, {true, true, true}}, Stack{{1040, 16}, 64, 16, {true, true}},
                         Stack{{272, 2208}, 80, 8, {false, true}}, Stack{{128}, 48, 8, {true}},
                         Stack{{32, 64}, 32, 5, {true, true}}, Stack{{32, 64}, 32, 32, {true, true}}}) {
    for (const int64_t rows : {1, 17, 64, 300, 5000}) {
      const auto type = at::kBFloat16;
      Linears own(s);
      auto& [linears, pairs, all] = own;
      uint64_t seed = 1;
      for (Linear* linear : all) linear->weight.quantized = Fp8Tensor::quantize(Linears::weight(*linear, seed++));
      const int64_t out = std::accumulate(s.outs.begin(), s.outs.end(), int64_t{0});
      const at::Tensor x = randn({rows, s.in}, 100).to(type).to(gpu()), dy = randn({rows, out}, 101).to(type).to(gpu());
      // The pairs' outputs and gradients in place, then with their room: both add the same to the same products.
      std::vector<at::Tensor> expected;
      for (const PairForm form : {PairForm::kInPlace, PairForm::kAugmented}) {
        stack_weights(all, form);
        const auto stack = LinearStack::of({all.begin(), all.end()}, type, nullptr);
        stack->refresh_pairs();
        own.begin_gradients();
        const at::NoGradGuard no_grad;
        at::Tensor low;
        const at::Tensor y = stack->forward(x, low);
        // With room, ranks are whole extents: 16 where the pairs have 10.
        const int64_t ranks = s.rank * std::count(s.paired.begin(), s.paired.end(), true);
        EXPECT_EQ(low.size(1), form == PairForm::kInPlace ? ranks : (ranks + 7) / 8 * 8);
        std::vector<at::Tensor> results = {y, stack->backward(dy, low)};
        stack->backward_a(low, x);
        for (size_t i = 0; i < pairs.size(); ++i) {
          if (!s.paired[i]) continue;
          results.push_back(pairs[i]->a.grad());
          results.push_back(pairs[i]->b.grad());
        }
        if (form == PairForm::kInPlace) {
          expected = results;
          continue;
        }
        for (size_t i = 0; i < results.size(); ++i) EXPECT(away(results[i], expected[i]) < 0.02);
      }
    }
  }
}
