#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <nlohmann/json.hpp>

#include "check.h"
#include "core/base/fs.h"
#include "core/base/rng.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"
#include "core/lora/adapter_config.h"
#include "core/lora/adapter_io.h"
#include "core/lora/lora_layer.h"
#include "core/lora/merge.h"
#include "core/nn/linear.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

at::Tensor leaf(const at::Tensor& value) { return value.detach().clone().requires_grad_(true); }

struct LoraCase {
  at::Tensor x = leaf(randn({7, 12}, 1)), weight = leaf(randn({5, 12}, 2)), bias = leaf(randn({5}, 3)),
             dy = randn({7, 5}, 4);
  LoraLayer lora{leaf(randn({3, 12}, 5)), leaf(randn({5, 3}, 6)), 1.75, 0.0, 0, {}, {}};

  Parameter base() const { return {"weight", {5, 12}, weight, nullptr, {}}; }

  // y = x Wᵀ + b + s · (kept(x) Aᵀ) Bᵀ, by autograd alone.
  at::Tensor plain(const at::Tensor& input, bool with_bias) const {
    const at::Tensor base = at::matmul(x, weight.t());
    return (with_bias ? base + bias : base) + lora.scaling * at::matmul(at::matmul(input, lora.a.t()), lora.b.t());
  }
};

// Gradients of all of them; undefined where a leaf did not ask.
void check_gradients(const at::Tensor& own, const at::Tensor& plain, const at::Tensor& dy,
                     const std::vector<at::Tensor>& leaves) {
  EXPECT_CLOSE(own, plain, 1e-5);
  const auto expected = torch::autograd::grad({plain}, leaves, {dy});
  const auto grads = torch::autograd::grad({own}, leaves, {dy});
  for (size_t i = 0; i < leaves.size(); ++i) EXPECT_CLOSE(grads[i], expected[i], 2e-5);
}

// A LLaVA checkpoint of a few tensors: merging reads nothing of the model but its type.
constexpr const char* kQuery = "language_model.model.layers.0.self_attn.q_proj.weight";  // the 4.x spelling
constexpr const char* kOther = "language_model.model.layers.0.self_attn.k_proj.weight";

struct MergeCase {
  TemporaryFolder folder;
  // Multiples of powers of two: products and sums are exact in float32, whatever their order, and too fine for
  // bfloat16.
  at::Tensor weight = ((randn({6, 8}, 1) * 64).round() / 8).to(at::kBFloat16);
  at::Tensor a = (randn({2, 8}, 2) * 64).round() / 64, b = (randn({6, 2}, 3) * 64).round() / 64;
  at::Tensor other = randn({4, 8}, 4, at::kBFloat16), norm = randn({8}, 5);
  double scaling = 8.0 / 2;

  MergeCase() {
    for (const char* dir : {"model", "adapter", "out"}) std::filesystem::create_directory(folder / dir);
    write_bytes(folder / "model/config.json", R"({"model_type": "llava"})");
    write_safetensors(folder / "model/model.safetensors",
                      {{kQuery, weight}, {kOther, other}, {"language_model.model.norm.weight", norm}},
                      {{"format", "pt"}});
    write_pair("model.language_model.layers.0.self_attn.q_proj", a, b);
  }

  void write_pair(const std::string& module, const at::Tensor& a_matrix, const at::Tensor& b_matrix) {
    AdapterWeights adapter;
    adapter.config.r = a_matrix.size(0);
    adapter.config.lora_alpha = 8;
    adapter.config.target_modules = {"q_proj"};
    adapter.pairs[module] = {a_matrix, b_matrix, {}};
    write_adapter(folder / "adapter", adapter);
  }

  json merge(std::optional<std::string> dtype = {}) {
    json args = {{"modelDir", (folder / "model").string()},
                 {"adapterDir", (folder / "adapter").string()},
                 {"outputDir", (folder / "out").string()},
                 {"maxShardSize", int64_t{1} << 30}};
    if (dtype) args["dtype"] = *dtype;
    JobContext job([](const std::string&) {});
    return merge_adapter_json(args, job);
  }

  at::Tensor exact() const {
    return weight.to(at::kDouble) + scaling * at::matmul(b.to(at::kDouble), a.to(at::kDouble));
  }
};

}  // namespace

TEST("lora_linear is x Wᵀ + b + s (x Aᵀ) Bᵀ, all five gradients") {
  LoraCase c;
  check_gradients(lora_linear(c.x, c.base(), c.bias, c.lora, nullptr), c.plain(c.x, true), c.dy,
                  {c.x, c.weight, c.bias, c.lora.a, c.lora.b});
}

TEST("lora_linear without a bias") {
  LoraCase c;
  check_gradients(lora_linear(c.x, c.base(), at::Tensor(), c.lora, nullptr), c.plain(c.x, false), c.dy,
                  {c.x, c.weight, c.lora.a, c.lora.b});
}

TEST("lora_linear with a frozen base: gradients of x, A and B only") {
  for (const bool with_bias : {true, false}) {
    LoraCase c;
    c.weight = c.weight.detach();
    c.bias = c.bias.detach();
    check_gradients(lora_linear(c.x, c.base(), with_bias ? c.bias : at::Tensor(), c.lora, nullptr),
                    c.plain(c.x, with_bias), c.dy, {c.x, c.lora.a, c.lora.b});
  }
}

TEST("lora_linear on an input without gradient: the first layer of a frozen model") {
  LoraCase c;
  c.x = c.x.detach();
  c.weight = c.weight.detach();
  check_gradients(lora_linear(c.x, c.base(), at::Tensor(), c.lora, nullptr), c.plain(c.x, false), c.dy,
                  {c.lora.a, c.lora.b});
}

TEST("a dropout of 0 with a source is no dropout, to the bit") {
  LoraCase c;
  DropoutSource source{make_generator(at::kCPU), 9};
  EXPECT_SAME(lora_linear(c.x, c.base(), c.bias, c.lora, &source), lora_linear(c.x, c.base(), c.bias, c.lora, nullptr));
}

TEST("dropout acts on the adapter's input only and is scaled by 1 / (1 - p), gradients too") {
  LoraCase c;
  c.lora.dropout = 0.4;
  c.lora.index = 3;
  DropoutSource source{make_generator(at::kCPU), 9};
  const at::Tensor mask = source.mask(c.x, 0.4, 3);
  const int64_t kept = mask.sum().item<int64_t>();
  EXPECT(kept > 0 && kept < mask.numel());
  const at::Tensor own = lora_linear(c.x, c.base(), c.bias, c.lora, &source);
  check_gradients(own, c.plain(c.x * mask / 0.6, true), c.dy, {c.x, c.weight, c.bias, c.lora.a, c.lora.b});
  // Evaluation has no source.
  EXPECT_CLOSE(lora_linear(c.x, c.base(), c.bias, c.lora, nullptr), c.plain(c.x, true), 1e-5);
}

TEST("dropout masks depend on seed and layer, not on what was drawn before, and keep 1 - p") {
  const at::Tensor like = at::empty({200, 100}, at::kFloat);
  DropoutSource source{make_generator(at::kCPU), 1};
  const at::Tensor first = source.mask(like, 0.1, 0), second = source.mask(like, 0.1, 1);
  EXPECT(!at::equal(first, second));
  EXPECT_SAME(source.mask(like, 0.1, 0), first);
  DropoutSource other{make_generator(at::kCPU), 2};
  EXPECT(!at::equal(other.mask(like, 0.1, 0), first));
  // 20000 draws: a standard deviation of 0.002.
  EXPECT_CLOSE(first.to(at::kDouble).mean().item<double>(), 0.9, 0.01);
}

TEST("Linear uses the adapter that is switched on") {
  LoraCase c;
  Linear linear(12, 5, true);
  linear.weight.value = c.weight;
  linear.bias.value = c.bias;
  const at::Tensor base = linear.forward(c.x);
  linear.lora = &c.lora;
  EXPECT_CLOSE(linear.forward(c.x), c.plain(c.x, true), 1e-5);
  linear.lora = nullptr;
  EXPECT_SAME(linear.forward(c.x), base);
}

TEST("merging sums in float32 and rounds once; other tensors are copied to the bit under their own names") {
  MergeCase c;
  const json result = c.merge();
  EXPECT_EQ(result["mergedTensors"].get<int64_t>(), 1);
  const Checkpoint out = Checkpoint::open(c.folder / "out");
  EXPECT_EQ(out.names().size(), 3u);
  EXPECT_SAME(out.tensor(kQuery), c.exact().to(at::kBFloat16));
  EXPECT_SAME(out.tensor(kOther), c.other);
  EXPECT_SAME(out.tensor("language_model.model.norm.weight"), c.norm);
  // The case must tell: an update that is rounded before the sum gives something else.
  const at::Tensor update = (c.scaling * at::matmul(c.b, c.a)).to(at::kBFloat16);
  EXPECT(!at::equal(c.weight + update, c.exact().to(at::kBFloat16)));
  const double error = (out.tensor(kQuery).to(at::kDouble) - c.exact()).abs().max().item<double>();
  EXPECT_CLOSE(result["maxAbsError"].get<double>(), error, 0);
  EXPECT(error > 0);
}

TEST("merging into float32 keeps the exact sum and converts every tensor") {
  MergeCase c;
  const json result = c.merge("float32");
  const Checkpoint out = Checkpoint::open(c.folder / "out");
  EXPECT_SAME(out.tensor(kQuery), c.exact().to(at::kFloat));
  EXPECT_SAME(out.tensor(kOther), c.other.to(at::kFloat));
  EXPECT_EQ(result["maxAbsError"].get<double>(), 0.0);
}

TEST("an adapter of another model is refused before anything is written") {
  MergeCase c;
  c.write_pair("model.language_model.layers.7.self_attn.q_proj", c.a, c.b);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kAdapter, c.merge()).details_json(), "layers.7.self_attn.q_proj");
  c.write_pair("model.language_model.layers.0.self_attn.q_proj", randn({2, 9}, 1), c.b);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kAdapter, c.merge()).details_json(), "layers.0.self_attn.q_proj");
  EXPECT(std::filesystem::is_empty(c.folder / "out"));
}

TEST("adapter folders: written and read back; half a pair, a wrong rank and broken files are refused by name") {
  const TemporaryFolder folder;
  const auto same_key = [](const std::string& key) { return key; };
  AdapterWeights adapter;
  adapter.config.r = 4;
  adapter.config.lora_alpha = 6;
  adapter.config.target_modules = {"q_proj"};
  adapter.pairs["layers.0.q_proj"] = {randn({4, 8}, 1), randn({6, 4}, 2), {}};
  write_adapter(folder.path(), adapter);
  const AdapterWeights read = read_adapter(folder.path(), same_key);
  EXPECT_SAME(read.pairs.at("layers.0.q_proj").a, adapter.pairs["layers.0.q_proj"].a);
  EXPECT_SAME(read.pairs.at("layers.0.q_proj").b, adapter.pairs["layers.0.q_proj"].b);
  EXPECT_CLOSE(read.config.scaling("layers.0.q_proj"), 1.5, 0);

  const auto refused = [&](const std::string& part) {
    const Error error = EXPECT_THROWS_CODE(code::kAdapter, read_adapter(folder.path(), same_key));
    EXPECT_CONTAINS(error.what(), part);
  };
  const std::filesystem::path weights = folder / "adapter_model.safetensors";
  write_safetensors(weights, {{"base_model.model.layers.0.q_proj.lora_A.weight", randn({4, 8}, 1)}}, {});
  refused("layers.0.q_proj has only one half");
  write_safetensors(
      weights,
      {{"base_model.model.w.lora_A.weight", randn({3, 8}, 1)}, {"base_model.model.w.lora_B.weight", randn({6, 3}, 2)}},
      {});
  refused("w has rank 3");
  write_safetensors(weights, {{"layers.0.q_proj.lora_A.weight", randn({4, 8}, 1)}}, {});
  refused("base_model.model.");
  write_bytes(weights, "broken");
  refused("adapter_model.safetensors");
  std::filesystem::remove(weights);
  refused("no adapter_model.safetensors");
  write_bytes(folder / "adapter_config.json", "{");
  refused("adapter_config.json");
  std::filesystem::remove(folder / "adapter_config.json");
  refused("no adapter_config.json");
}

TEST("scaling: alpha / r, alpha / sqrt(r) with rslora, exceptions by pattern") {
  AdapterConfig config;
  config.r = 16;
  config.lora_alpha = 32;
  EXPECT_CLOSE(config.scaling("a.q_proj"), 2.0, 0);
  config.use_rslora = true;
  EXPECT_CLOSE(config.scaling("a.q_proj"), 8.0, 0);
  config.use_rslora = false;
  config.rank_pattern = {{"q_proj", 4}};
  config.alpha_pattern = {{"layers.1.v_proj", 8}};
  EXPECT_CLOSE(config.scaling("layers.1.q_proj"), 8.0, 0);
  EXPECT_CLOSE(config.scaling("layers.1.v_proj"), 0.5, 0);
  EXPECT_CLOSE(config.scaling("layers.1.my_q_proj"), 2.0, 0);
}
