// The decoder's layer written out, beside the layer under autograd: outputs, and gradients of x and of every pair.
#include "core/language/frozen_layer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>

#include "check.h"
#include "layer_case.h"

using namespace martlet;
using namespace martlet::test;

namespace {

// Of the largest gradient of each tensor.
void check_relative(const at::Tensor& actual, const at::Tensor& expected, double tolerance, const std::string& what) {
  if (actual.defined() != expected.defined()) return record_failure(__FILE__, __LINE__, what + ": one is undefined");
  if (!actual.defined()) return;
  const at::Tensor a = actual.to(at::kDouble), e = expected.to(at::kDouble);
  const double largest = e.abs().max().item<double>();
  const double distance = (a - e).abs().max().item<double>() / largest;
  if (!(largest > 0 && distance <= tolerance))
    record_failure(__FILE__, __LINE__, what + ": " + std::to_string(distance) + " of the largest away");
}

void compare(const std::string& what, LayerOptions options, double tolerance) {
  if (options.form == PairForm::kInPlace) {
    LayerOptions augmented = options;
    augmented.form = PairForm::kAugmented;
    compare(what + ", augmented", augmented, tolerance);
  }
  for (const Recompute recompute : {Recompute::kNone, Recompute::kCheap, Recompute::kMlp, Recompute::kLayer}) {
    LayerCase c(options);
    const LayerResult expected = c.run(/*written_out=*/false, recompute);
    EXPECT(!c.took_written_out);
    const LayerResult actual = c.run(/*written_out=*/true, recompute);
    EXPECT(c.took_written_out);
    EXPECT_EQ(actual.size(), expected.size());
    for (const auto& [name, tensor] : expected) check_relative(actual.at(name), tensor, tolerance, what + ", " + name);
    // Whatever is made again: the same bits.
    const LayerResult kept = c.run(/*written_out=*/true, Recompute::kNone);
    for (const auto& [name, tensor] : kept) EXPECT_SAME(actual.at(name), tensor);
  }
}

}  // namespace

TEST("all seven linears: value, gradients of x and of every pair, at each level of recompute") {
  compare("plain", {}, 1e-5);
}

TEST("grouped heads, biases of q, k and v, norms of q and k, packed rows of several lengths, positions of three axes") {
  LayerOptions options;
  options.config.num_kv_heads = 2;
  compare("grouped heads", options, 1e-5);
  options.config.qkv_bias = true;
  compare("biases", options, 1e-5);
  options.lengths = {5, 9, 1, 9, 7};
  compare("packed rows", options, 1e-5);
  options.config.qk_norm = true;
  compare("norms of q and k", options, 1e-5);
  options.axes = true;
  options.config.rope_float32 = true;
  compare("three axes", options, 1e-5);
}

TEST("one fused linear for q, k and v") {
  LayerOptions options;
  options.config.fused_qkv = true;
  options.config.qkv_bias = true;
  compare("fused", options, 1e-5);
}

TEST("pairs on some of the linears only") {
  for (const std::vector<std::string>& targets : std::vector<std::vector<std::string>>{
           {"q_proj", "v_proj"}, {"k_proj"}, {"o_proj"}, {"up_proj"}, {"gate_proj", "down_proj"}, {"down_proj"}, {}}) {
    LayerOptions options;
    options.targets = targets;
    std::string what = "targets";
    for (const std::string& target : targets) what += " " + target;
    compare(what, options, 1e-5);
  }
}

TEST("an input without gradient: the first layer") {
  LayerOptions options;
  options.input_grad = false;
  options.form = PairForm::kAugmented;
  // Recomputed layers of autograd need an input that requires grad.
  LayerCase c(options);
  const LayerResult expected = c.run(/*written_out=*/false, Recompute::kNone);
  for (const Recompute recompute : {Recompute::kNone, Recompute::kMlp, Recompute::kLayer}) {
    const LayerResult actual = c.run(/*written_out=*/true, recompute);
    EXPECT(c.took_written_out);
    EXPECT(!actual.at("x").defined());
    for (const auto& [name, tensor] : expected) check_relative(actual.at(name), tensor, 2e-6, name);
  }
}

TEST("augmented: the gradient of a layer's input serves the layer before as it is, pairs that change are read anew") {
  LayerOptions options;
  options.form = PairForm::kAugmented;
  options.config.qkv_bias = true;
  LayerCase first(options), second(options);
  const auto run = [&](bool written_out) {
    std::map<std::string, at::Tensor> grads;
    for (LayerCase* c : {&first, &second}) {
      for (auto& [name, pair] : c->pairs) {
        pair.a.mutable_grad().reset();
        pair.b.mutable_grad().reset();
      }
    }
    const at::Tensor x = first.x.detach().requires_grad_(true);
    const at::Tensor y = second.apply(first.apply(x, written_out, Recompute::kNone), written_out, Recompute::kNone);
    EXPECT_EQ(first.took_written_out, written_out);
    torch::autograd::backward({y}, {first.dy});
    grads["x"] = x.grad();
    for (LayerCase* c : {&first, &second}) {
      const std::string of = c == &first ? "first " : "second ";
      for (auto& [name, pair] : c->pairs) {
        grads[of + name + ".A"] = pair.a.grad();
        grads[of + name + ".B"] = pair.b.grad();
      }
    }
    return grads;
  };
  for (int round = 0; round < 2; ++round) {
    const auto expected = run(false), actual = run(true);
    for (const auto& [name, tensor] : expected)
      check_relative(actual.at(name), tensor, 5e-5, "round " + std::to_string(round) + ", " + name);
    const at::NoGradGuard no_grad;
    for (LayerCase* c : {&first, &second}) {
      for (auto& [name, pair] : c->pairs) {
        pair.a.mul_(-1.5);
        pair.b.add_(0.1);
      }
      refresh_layer_pairs(*c->layer);
    }
  }
}

namespace {

// Of one input, with copies of their values.
struct TwoLinears {
  Linear a{3, 4, true}, b{3, 2, true};
  at::Tensor wa = randn({4, 3}, 1), wb = randn({2, 3}, 2), ba = randn({4}, 3), bb = randn({2}, 4);
  TwoLinears() {
    a.weight.value = wa.clone();
    b.weight.value = wb.clone();
    a.bias.value = ba.clone();
    b.bias.value = bb.clone();
  }
};

}  // namespace

TEST("augmented: weights keep their values, with room for pairs beside them and without; pairs that do not fit") {
  TwoLinears two;
  auto& [a, b, wa, wb, ba, bb] = two;
  LoraLayer pair;
  pair.a = randn({5, 3}, 5).requires_grad_(true);
  pair.b = randn({2, 5}, 6).requires_grad_(true);
  b.lora = &pair;
  const auto form = [&] { return LinearStack::of({&a, &b}, at::kFloat, nullptr)->form(); };
  const auto check = [&] {
    EXPECT_SAME(a.weight.value, wa);
    EXPECT_SAME(b.weight.value, wb);
    EXPECT_SAME(a.bias.value, ba);
    EXPECT_SAME(b.bias.value, bb);
  };
  stack_weights({&a, &b}, PairForm::kAugmented);
  check();
  EXPECT(form() == PairForm::kAugmented);
  EXPECT_EQ(a.weight.value.stride(0), 32);  // 128 bytes
  // Ranks that there is no room for.
  pair.a = randn({9, 3}, 5).requires_grad_(true);
  pair.b = randn({2, 9}, 6).requires_grad_(true);
  EXPECT(form() == PairForm::kInPlace);
  stack_weights({&a, &b}, PairForm::kAugmented);
  check();
  EXPECT(form() == PairForm::kAugmented);
  b.lora = nullptr;
  stack_weights({&a, &b}, PairForm::kAugmented);
  check();
  EXPECT(a.weight.value.is_contiguous());
  EXPECT(form() == PairForm::kInPlace);
  // Pairs in another dtype than the weights are added in place.
  pair.a = pair.a.detach().to(at::kDouble).requires_grad_(true);
  pair.b = pair.b.detach().to(at::kDouble).requires_grad_(true);
  b.lora = &pair;
  stack_weights({&a, &b}, PairForm::kAugmented);
  check();
  EXPECT(form() == PairForm::kInPlace);
}

TEST("weights of 4 and 8 bits, dequantised for each product") {
  for (const auto method : {QuantizationOptions::Method::kNf4, QuantizationOptions::Method::kInt8}) {
    LayerOptions options;
    options.quantization = {method, true};
    options.config.num_kv_heads = 2;
    for (const bool bias : {false, true}) {
      options.config.qkv_bias = bias;
      compare(method == QuantizationOptions::Method::kNf4 ? "nf4" : "int8", options, 1e-5);
    }
  }
  // Both forms of one stack. The pairs' ranks add up to 11 of 16 columns.
  TwoLinears two;
  auto& [a, b, wa, wb, ba, bb] = two;
  LoraLayer pairs[2];
  int64_t seed = 10;
  for (const auto& [linear, pair, rank] : {std::tuple(&a, &pairs[0], 5), {&b, &pairs[1], 6}}) {
    linear->weight.quantized = quantize(linear->weight.value, {QuantizationOptions::Method::kNf4, false});
    linear->weight.value.reset();
    pair->a = randn({rank, 3}, seed++).requires_grad_(true);
    pair->b = randn({linear->out_features(), rank}, seed++).requires_grad_(true);
    pair->scaling = 0.7;
    linear->lora = pair;
  }
  stack_weights({&a, &b}, PairForm::kInPlace);
  const at::Tensor x = randn({7, 3}, 1), dy = randn({7, 6}, 2);
  std::vector<at::Tensor> expected;
  for (const PairForm form : {PairForm::kInPlace, PairForm::kAugmented}) {
    for (LoraLayer& pair : pairs) {
      pair.a.mutable_grad().reset();
      pair.b.mutable_grad().reset();
    }
    const auto stack = LinearStack::of({&a, &b}, at::kFloat, nullptr, form);
    EXPECT(stack->form() == form);
    at::Tensor in = stack->empty_input(7), out = stack->empty_output(7), low;
    in.copy_(x);
    const at::Tensor y = stack->forward(in, low, out).clone();
    out.copy_(dy);
    const at::Tensor dx = stack->backward(out, low);
    stack->backward_a(low, x);
    const std::vector<at::Tensor> actual = {
        y, dx, pairs[0].a.grad(), pairs[0].b.grad(), pairs[1].a.grad(), pairs[1].b.grad()};
    if (expected.empty()) expected = actual;
    for (size_t i = 0; i < actual.size(); ++i) check_relative(actual[i], expected[i], 1e-5, std::to_string(i));
  }
}

TEST("gradients are added to those that are there") {
  LayerOptions options;
  options.form = PairForm::kAugmented;
  LayerCase c(options);
  const LayerResult once = c.run(/*written_out=*/true, Recompute::kNone);
  const LayerResult twice = c.run(/*written_out=*/true, Recompute::kNone, /*keep_gradients=*/true);
  for (const auto& [name, tensor] : once) {
    if (name.find("lora") != std::string::npos) check_relative(twice.at(name), 2 * tensor, 1e-6, name);
  }
}

TEST("in bfloat16, with pairs in bfloat16 and in float32: as near to float32 as the layer under autograd is") {
  for (const auto& [pairs, form] :
       {std::pair(at::kBFloat16, PairForm::kInPlace), std::pair(at::kFloat, PairForm::kInPlace),
        std::pair(at::kBFloat16, PairForm::kAugmented)}) {
    LayerOptions options;
    options.form = form;
    options.config.num_kv_heads = 2;
    options.config.qkv_bias = true;
    options.dtype = at::kBFloat16;
    options.pair_dtype = pairs;
    LayerCase c(options);
    const LayerResult reference = c.run(/*written_out=*/false, Recompute::kNone),
                      actual = c.run(/*written_out=*/true, Recompute::kNone);
    EXPECT(c.took_written_out);
    const LayerResult exact = LayerCase(options, at::kFloat).run(/*written_out=*/false, Recompute::kNone);
    // A tensor's distance is that of a few hundred roundings, up and down by a quarter; all of them together are not.
    double own_squares = 0, reference_squares = 0;
    for (const auto& [name, tensor] : exact) {
      const double own = relative_error(actual.at(name), tensor),
                   of_reference = relative_error(reference.at(name), tensor);
      own_squares += own * own;
      reference_squares += of_reference * of_reference;
      if (!(own <= 1.5 * of_reference)) {
        record_failure(__FILE__, __LINE__,
                       name + ": " + std::to_string(own) + " from float32, autograd " + std::to_string(of_reference));
      }
    }
    const double ratio = std::sqrt(own_squares / reference_squares);
    if (!(ratio <= 1.05)) record_failure(__FILE__, __LINE__, std::to_string(ratio) + " of autograd's distance");
  }
}

TEST("what another path must do is left to it") {
  const auto refused = [](const std::string& what, const std::function<void(LayerCase&)>& change) {
    LayerCase c({});
    change(c);
    c.run(/*written_out=*/true, Recompute::kNone);
    if (c.took_written_out) record_failure(__FILE__, __LINE__, what + " was taken");
  };
  refused("DoRA", [](LayerCase& c) {
    LoraLayer& lora = c.pairs.at("q_proj");
    lora.magnitude = at::ones({lora.b.size(0)}).requires_grad_(true);
    refresh_weight_norm(c.linears.at("q_proj")->weight, lora);
  });
  refused("a trained weight", [](LayerCase& c) { c.linears.at("o_proj")->weight.value.requires_grad_(true); });
  refused("a trained norm",
          [](LayerCase& c) { static_cast<RmsNorm&>(*c.layer->input_layernorm).weight.value.requires_grad_(true); });
  refused("weights that are not stacked", [](LayerCase& c) {
    Parameter& weight = c.linears.at("up_proj")->weight;
    weight.value = weight.value.clone();
  });
  refused("one quantised weight of two", [](LayerCase& c) {
    Parameter& weight = c.linears.at("up_proj")->weight;
    weight.quantized = quantize(weight.value, {QuantizationOptions::Method::kNf4, true});
    weight.value.reset();
  });
  refused("evaluation", [](LayerCase& c) { c.training = false; });
  refused("LoRA's dropout", [](LayerCase& c) {
    c.with_dropout_source = true;
    c.pairs.at("k_proj").dropout = 0.1;
  });
  refused("an observer's pass", [](LayerCase& c) { c.observed = true; });
}

TEST("stacked weights: each linear keeps its values, and memory of its own rows only is shared") {
  TwoLinears two;
  auto& [a, b, wa, wb, ba, bb] = two;
  stack_weights({&a, &b}, PairForm::kInPlace);
  EXPECT_SAME(a.weight.value, wa);
  EXPECT_SAME(b.weight.value, wb);
  EXPECT_SAME(a.bias.value, ba);
  EXPECT_SAME(b.bias.value, bb);
  EXPECT(a.weight.value.storage().is_alias_of(b.weight.value.storage()));
  b.weight.value.zero_();
  EXPECT_SAME(a.weight.value, wa);
  const void* before = a.weight.value.const_data_ptr();
  stack_weights({&a, &b}, PairForm::kInPlace);  // nothing to do
  EXPECT(a.weight.value.const_data_ptr() == before);
}
