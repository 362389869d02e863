#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <map>

#include "check.h"
#include "core/nn/activation.h"
#include "core/nn/attention.h"
#include "core/nn/checkpoint.h"
#include "core/nn/linear.h"
#include "core/nn/norm.h"
#include "core/nn/rope.h"

using namespace martlet;
using namespace martlet::test;

namespace {

at::Tensor leaf(const at::Tensor& value) { return value.detach().clone().requires_grad_(true); }

// softmax(q kᵀ / √d) v over one row, in float64; kv heads are shared by groups of query heads.
at::Tensor plain_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  const int64_t groups = q.size(1) / k.size(1), length = q.size(0);
  const auto heads_first = [](const at::Tensor& x) { return x.to(at::kDouble).transpose(0, 1); };
  const at::Tensor keys = heads_first(k).repeat_interleave(groups, 0);
  const at::Tensor values = heads_first(v).repeat_interleave(groups, 0);
  at::Tensor scores = at::matmul(heads_first(q), keys.transpose(1, 2)) / std::sqrt(static_cast<double>(q.size(2)));
  if (causal) {
    scores = scores.masked_fill(at::ones({length, length}, at::kBool).triu(1), -INFINITY);
  }
  return at::matmul(scores.softmax(-1), values).transpose(0, 1);
}

void check_packed(const std::vector<int64_t>& lengths, int64_t kv_heads, bool causal) {
  const SequenceLengths rows = SequenceLengths::from_lengths(lengths, at::kCPU);
  const at::Tensor q = leaf(randn({rows.total(), 4, 8}, 1)), k = leaf(randn({rows.total(), kv_heads, 8}, 2)),
                   v = leaf(randn({rows.total(), kv_heads, 8}, 3));
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < rows.rows(); ++i) {
    const auto row = [&](const at::Tensor& x) { return x.slice(0, rows.offsets[i], rows.offsets[i + 1]); };
    parts.push_back(plain_attention(row(q), row(k), row(v), causal));
  }
  const at::Tensor expected = at::cat(parts), actual = packed_attention(q, k, v, rows, causal);
  EXPECT_CLOSE(actual, expected, 1e-5);
  const at::Tensor dy = randn(actual.sizes(), 4);
  const auto expected_grads = torch::autograd::grad({expected}, {q, k, v}, {dy.to(at::kDouble)});
  const auto grads = torch::autograd::grad({actual}, {q, k, v}, {dy});
  for (size_t i = 0; i < grads.size(); ++i) EXPECT_CLOSE(grads[i], expected_grads[i], 1e-5);
}

// A tree of two levels for load and verify.
struct Block : Module {
  Block() : proj(2, 3, true), norm(3, 1e-6) {
    register_module(proj, "proj");
    register_module(norm, "norm");
  }
  Linear proj;
  RmsNorm norm;
};
struct Tree : Module {
  Tree() : head(3, 4, false) {
    register_module(block, "block.0");
    register_module(head, "head");
  }
  Block block;
  Linear head;
};

WeightSource source_of(const std::map<std::string, at::Tensor>& weights) {
  return [weights](const std::string& name) {
    const auto it = weights.find(name);
    return it == weights.end() ? at::Tensor() : it->second;
  };
}

std::map<std::string, at::Tensor> tree_weights() {
  return {{"block.0.proj.weight", randn({3, 2}, 1)},
          {"block.0.proj.bias", randn({3}, 2)},
          {"block.0.norm.weight", randn({3}, 3)},
          {"head.weight", randn({4, 3}, 4)}};
}

}  // namespace

TEST("SequenceLengths: offsets, the longest row, uniform or not") {
  const SequenceLengths rows = SequenceLengths::from_lengths({3, 1, 5}, at::kCPU);
  EXPECT_EQ(rows.rows(), 3);
  EXPECT_EQ(rows.total(), 9);
  EXPECT_EQ(rows.max_length, 5);
  EXPECT(!rows.uniform());
  EXPECT_SAME(rows.cu_seqlens, at::tensor({0, 3, 4, 9}, at::kInt));
  EXPECT(SequenceLengths::from_lengths({4, 4}, at::kCPU).uniform());
}

TEST("packed attention is each row's own attention, values and gradients: rows of different lengths") {
  check_packed({5, 1, 7, 2}, 4, true);
  check_packed({5, 1, 7, 2}, 4, false);
}

TEST("packed attention is each row's own attention, values and gradients: rows of one length") {
  check_packed({6, 6, 6}, 4, true);
  check_packed({6, 6, 6}, 4, false);
}

TEST("packed attention with fewer key heads than query heads") {
  check_packed({5, 3}, 2, true);
  check_packed({4, 4}, 1, true);
}

TEST("decoding one position is the last row of causal attention") {
  const at::Tensor q = randn({6, 4, 8}, 1), k = randn({6, 2, 8}, 2), v = randn({6, 2, 8}, 3);
  EXPECT_CLOSE(decode_attention(q.narrow(0, 5, 1), k, v), plain_attention(q, k, v, true).narrow(0, 5, 1), 1e-5);
}

TEST("decoding one position of 16-bit numbers is the same in float64, rounded once, whatever the sizes") {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    for (const auto& [length, heads, kv_heads, dim] :
         std::vector<std::array<int64_t, 4>>{{1, 2, 2, 8}, {7, 6, 2, 20}, {300, 12, 2, 128}, {33, 3, 1, 80}}) {
      const at::Tensor q = randn({1, heads, dim}, 4, dtype), k = randn({length + 3, kv_heads, dim}, 5, dtype),
                       v = randn({length, kv_heads, dim}, 6, dtype);
      for (const std::optional<double> scale : {std::optional<double>(), std::optional<double>(0.5)}) {
        AttentionExtras extras;
        extras.scale = scale;
        const auto repeated = [&, group = heads / kv_heads](const at::Tensor& x) {
          return x.to(at::kDouble).repeat_interleave(group, 1).transpose(0, 1);  // [heads, length, d]
        };
        const at::Tensor keys = k.narrow(0, 2, length);
        const at::Tensor scores = at::matmul(repeated(keys), q.to(at::kDouble).view({heads, dim, 1})).squeeze(2) *
                                  scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
        const at::Tensor expected = at::matmul(at::softmax(scores, 1).unsqueeze(1), repeated(v)).view({1, heads, dim});
        const at::Tensor y = decode_attention(q, keys, v, extras);
        EXPECT(y.scalar_type() == dtype);
        EXPECT_CLOSE(y, expected, (dtype == at::kHalf ? 1e-3 : 8e-3) * expected.abs().max().item<double>());
      }
    }
  }
}

TEST("rotary positions: pairs (i, i + d/2) turn by position · theta^(-2i/d); the backward turns back") {
  constexpr int64_t kTokens = 5, kHeads = 2, kDim = 8;
  constexpr double kTheta = 10000.0;
  const at::Tensor positions = at::tensor({0, 1, 2, 17, 300}, at::kLong);
  const at::Tensor x = leaf(randn({kTokens, kHeads, kDim}, 1));
  const at::Tensor y = apply_rotary(x, rotary_table(positions, kDim, kTheta, at::kFloat));
  at::Tensor expected = at::empty(x.sizes(), at::kDouble);
  const auto in = x.accessor<float, 3>();
  auto out = expected.accessor<double, 3>();
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = 0; i < kDim / 2; ++i) {
        const double angle = static_cast<double>(positions[t].item<int64_t>()) *
                             std::pow(kTheta, -2.0 * static_cast<double>(i) / static_cast<double>(kDim));
        const double a = in[t][h][i], b = in[t][h][i + kDim / 2];
        out[t][h][i] = a * std::cos(angle) - b * std::sin(angle);
        out[t][h][i + kDim / 2] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }
  // float32 angles: 300 rad have a spacing of 3e-5.
  EXPECT_CLOSE(y, expected, 1e-4);
  // A rotation keeps lengths, and its transpose is its inverse.
  const at::Tensor dx = torch::autograd::grad({y}, {x}, {y.detach()})[0];
  EXPECT_CLOSE(dx, x.detach(), 1e-5);
}

TEST("rotary positions on several axes: each frequency turns with its axis; two axes with frequencies of their own") {
  const at::Tensor positions = at::tensor({3, 5, 7, 11, 13, 17}, at::kLong).view({3, 2});  // [axes, T]
  const RotaryTable table = rotary_table(positions, {0, 2, 1, 0}, 8, 100.0, at::kFloat);
  const RotaryTable axial = axial_rotary_table(positions.narrow(0, 0, 2), 8, 100.0);
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t i = 0; i < 4; ++i) {
      const double place = static_cast<double>(positions[std::vector<int64_t>{0, 2, 1, 0}[i]][t].item<int64_t>());
      EXPECT_CLOSE(table.cos[t][0][i].item<double>(), std::cos(place * std::pow(100.0, -i / 4.0)), 1e-5);
      const double side = static_cast<double>(positions[i / 2][t].item<int64_t>());
      EXPECT_CLOSE(axial.sin[t][0][i].item<double>(), std::sin(side * std::pow(100.0, -(i % 2) / 2.0)), 1e-5);
    }
  }
  // A table in float32 turns 16-bit activations in float32 and rounds once.
  const at::Tensor x = randn({2, 3, 8}, 1, at::kBFloat16);
  EXPECT_SAME(apply_rotary(x, axial), apply_rotary(x.to(at::kFloat), axial).to(at::kBFloat16));
}

TEST("RmsNorm: x / sqrt(mean x² + eps), times the weight") {
  constexpr double kEps = 1e-2;
  RmsNorm norm(16, kEps);
  norm.weight.value = randn({16}, 1);
  const at::Tensor x = randn({3, 16}, 2), x64 = x.to(at::kDouble);
  const at::Tensor expected = x64 / (x64.pow(2).mean(-1, true) + kEps).sqrt() * norm.weight.value.to(at::kDouble);
  EXPECT_CLOSE(norm.forward(x), expected, 1e-5);
}

TEST("RmsNorm in bfloat16: normalised in float32, rounded, then times the weight") {
  RmsNorm norm(64, 1e-5);
  norm.weight.value = randn({64}, 1, at::kBFloat16);
  const at::Tensor x = randn({8, 64}, 2, at::kBFloat16), x32 = x.to(at::kFloat);
  const at::Tensor normalised = x32 * (x32.pow(2).mean(-1, true) + 1e-5).rsqrt();
  const at::Tensor expected = normalised.to(at::kBFloat16) * norm.weight.value;
  const at::Tensor rounded_once = (normalised * norm.weight.value.to(at::kFloat)).to(at::kBFloat16);
  EXPECT_SAME(norm.forward(x), expected);
  EXPECT(!at::equal(expected, rounded_once));  // so that the order of the two shows
}

TEST("LayerNorm: (x - mean) / sqrt(variance + eps), times the weight, plus the bias") {
  constexpr double kEps = 1e-2;
  LayerNorm norm(16, kEps);
  norm.weight.value = randn({16}, 1);
  norm.bias.value = randn({16}, 2);
  const at::Tensor x = randn({3, 16}, 3), x64 = x.to(at::kDouble), centred = x64 - x64.mean(-1, true);
  const at::Tensor expected =
      centred / (centred.pow(2).mean(-1, true) + kEps).sqrt() * norm.weight.value.to(at::kDouble) +
      norm.bias.value.to(at::kDouble);
  EXPECT_CLOSE(norm.forward(x), expected, 1e-5);
}

TEST("Linear and Embedding") {
  Linear with_bias(6, 4, true), without(6, 4, false);
  with_bias.weight.value = without.weight.value = randn({4, 6}, 1);
  with_bias.bias.value = randn({4}, 2);
  const at::Tensor x = randn({5, 6}, 3);
  const at::Tensor product = at::matmul(x.to(at::kDouble), without.weight.value.to(at::kDouble).t());
  EXPECT_CLOSE(without.forward(x), product, 1e-5);
  EXPECT_CLOSE(with_bias.forward(x), product + with_bias.bias.value.to(at::kDouble), 1e-5);
  Embedding embedding(7, 3);
  embedding.weight.value = randn({7, 3}, 4);
  EXPECT_SAME(embedding.forward(at::tensor({6, 0, 6}, at::kLong)),
              at::stack({embedding.weight.value[6], embedding.weight.value[0], embedding.weight.value[6]}));
}

TEST("activations by Hugging Face's names") {
  const at::Tensor x = at::linspace(-4, 4, 33), x64 = x.to(at::kDouble);
  const auto of = [&](const char* name) { return activate(x, parse_activation(name)); };
  const at::Tensor tanh_gelu = 0.5 * x64 * (1 + (std::sqrt(2 / M_PI) * (x64 + 0.044715 * x64.pow(3))).tanh());
  EXPECT_CLOSE(of("gelu"), 0.5 * x64 * (1 + (x64 / std::sqrt(2.0)).erf()), 1e-6);
  EXPECT_CLOSE(of("gelu_new"), tanh_gelu, 1e-6);
  EXPECT_CLOSE(of("gelu_pytorch_tanh"), tanh_gelu, 1e-6);
  EXPECT_CLOSE(of("quick_gelu"), x64 / (1 + (-1.702 * x64).exp()), 1e-6);
  EXPECT_CLOSE(of("silu"), x64 / (1 + (-x64).exp()), 1e-6);
  EXPECT_CLOSE(of("relu"), x64.clamp_min(0), 0);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kUnsupportedModel, of("swoosh")).what(), "swoosh");
}

TEST("swiglu is silu(gate) · up, with the gradients of the plain form") {
  const at::Tensor gate = leaf(randn({5, 8}, 1)), up = leaf(randn({5, 8}, 2)), dy = randn({5, 8}, 3);
  const at::Tensor plain = at::silu(gate) * up, own = swiglu(gate, up);
  EXPECT_CLOSE(own, plain, 1e-6);
  const auto expected = torch::autograd::grad({plain}, {gate, up}, {dy});
  const auto grads = torch::autograd::grad({own}, {gate, up}, {dy});
  EXPECT_CLOSE(grads[0], expected[0], 1e-6);
  EXPECT_CLOSE(grads[1], expected[1], 1e-6);
}

TEST("recompute gives the same gradients to the bit, and runs the layer twice") {
  const at::Tensor w = leaf(randn({16, 16}, 1)), dy = randn({4, 16}, 2);
  int runs = 0;
  const auto layer = [&](const at::Tensor& x) {
    ++runs;
    return at::gelu(at::matmul(x, w)) + x;
  };
  const auto gradients = [&](bool recompute) {
    const at::Tensor x = leaf(randn({4, 16}, 3));
    w.mutable_grad() = at::Tensor();
    at::Tensor y = x;
    for (int i = 0; i < 3; ++i)
      y = run_layer(layer, y, {.recompute = recompute ? Recompute::kLayer : Recompute::kNone});
    torch::autograd::backward({y}, {dy});
    return std::vector<at::Tensor>{y.detach(), x.grad(), w.grad()};
  };
  const auto plain = gradients(false);
  EXPECT_EQ(runs, 3);
  const auto recomputed = gradients(true);
  EXPECT_EQ(runs, 9);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_SAME(recomputed[i], plain[i]);
}

TEST("an exception inside a recomputed layer comes out of the backward pass") {
  int runs = 0;
  const at::Tensor x = leaf(randn({2, 2}, 1));
  const at::Tensor y = run_layer(
      [&](const at::Tensor& input) {
        if (++runs == 2) fail(code::kAborted, "second run");
        return input * 2;
      },
      x, {.recompute = Recompute::kLayer});
  EXPECT_THROWS_CODE(code::kAborted, torch::autograd::backward({y.sum()}));
}

TEST("a cancelled job ends at the next layer, forward and backward") {
  JobContext job([](std::string) {});
  const auto layer = [](const at::Tensor& input) { return input * 2; };
  const at::Tensor x = leaf(randn({2, 2}, 1));
  const at::Tensor y = run_layer(layer, x, {.job = &job});
  job.cancel();
  EXPECT_THROWS_CODE(code::kAborted, torch::autograd::backward({y.sum()}));
  EXPECT_THROWS_CODE(code::kAborted, run_layer(layer, x, {.job = &job}));
}

TEST("Module::load fills the tree in the dtype asked for, with copies of its own") {
  Tree tree;
  auto weights = tree_weights();
  LoadOptions options;
  int64_t bytes = 0;
  options.on_parameter = [&](const std::string&, int64_t size) { bytes += size; };
  tree.load(source_of(weights), options);
  tree.verify();
  EXPECT_EQ(bytes, static_cast<int64_t>(sizeof(float)) * (6 + 3 + 3 + 12));
  EXPECT_SAME(tree.block.proj.bias.value, weights["block.0.proj.bias"]);
  weights["head.weight"].zero_();
  EXPECT(tree.head.weight.value.abs().sum().item<double>() > 0);

  Tree half;
  options.dtype = at::kBFloat16;
  half.load(source_of(tree_weights()), options);
  EXPECT_SAME(half.head.weight.value, tree_weights()["head.weight"].to(at::kBFloat16));
}

TEST("Module::verify names all parameters that were not there") {
  Tree tree;
  auto weights = tree_weights();
  weights.erase("block.0.norm.weight");
  weights.erase("head.weight");
  tree.load(source_of(weights), {});
  const Error error = EXPECT_THROWS_CODE(code::kWeights, tree.verify());
  EXPECT_CONTAINS(error.what(), "2 tensor(s)");
  EXPECT_CONTAINS(error.details_json(), "[\"block.0.norm.weight\",\"head.weight\"]");
}

TEST("Module::load refuses another shape, by name, with both shapes") {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{2, 3}, {3, 2, 1, 1, 2}, {6}, {2, 3, 1}}) {
    Tree tree;
    auto weights = tree_weights();
    weights["block.0.proj.weight"] = randn(shape, 9);
    const Error error = EXPECT_THROWS_CODE(code::kWeights, tree.load(source_of(weights), {}));
    EXPECT_CONTAINS(error.what(), "block.0.proj.weight");
    EXPECT_CONTAINS(error.details_json(), "\"expected\":[3,2]");
  }
}

TEST("Module::load takes a convolution's kernel as the matrix it is") {
  Tree tree;
  auto weights = tree_weights();
  const at::Tensor kernel = randn({3, 1, 2, 1}, 9);
  weights["block.0.proj.weight"] = kernel;
  tree.load(source_of(weights), {});
  EXPECT_SAME(tree.block.proj.weight.value, kernel.view({3, 2}));
}
