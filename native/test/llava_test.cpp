// A LLaVA of two layers: loading through a session, and the passes that must agree with each other.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/base/fs.h"
#include "core/base/rng.h"
#include "core/io/safetensors.h"
#include "core/lora/adapter.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"
#include "core/session.h"
#include "core/train/batch.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

constexpr int64_t kImageToken = 19;

json config() {
  return {{"model_type", "llava"},
          {"image_token_index", kImageToken},
          {"text_config",
           {{"vocab_size", 20},
            {"hidden_size", 16},
            {"intermediate_size", 24},
            {"num_hidden_layers", 2},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 2},
            {"max_position_embeddings", 64}}},
          {"vision_config",
           {{"hidden_size", 8},
            {"intermediate_size", 12},
            {"num_hidden_layers", 3},
            {"num_attention_heads", 2},
            {"image_size", 8},
            {"patch_size", 4}}}};
}

std::unique_ptr<VisionLanguageModel> create() {
  return family_for(config(), "").create(config(), [](const std::string&) { return at::Tensor(); });
}

// Random weights for every parameter, by canonical name.
std::map<std::string, at::Tensor> random_weights() {
  std::map<std::string, at::Tensor> weights;
  uint64_t seed = 0;
  create()->visit_parameters(
      [&](const std::string& name, Parameter& parameter) { weights[name] = randn(parameter.shape, ++seed) * 0.3; });
  return weights;
}

std::unique_ptr<VisionLanguageModel> loaded() {
  auto model = create();
  const auto weights = random_weights();
  model->load([&](const std::string& name) { return weights.at(name); }, {});
  model->verify();
  return model;
}

// Writes a model folder and loads it in a session of its own.
json load(const std::map<std::string, at::Tensor>& weights, const json& options = json::object()) {
  const TemporaryFolder folder;
  write_text_file(folder / "config.json", config().dump());
  write_safetensors(folder / "model.safetensors", {weights.begin(), weights.end()}, {{"format", "pt"}});
  json args = {{"modelDir", folder.path().string()}, {"device", "cpu"}, {"dtype", "auto"}};
  args.update(options);
  Session session;
  JobContext job([](const std::string&) {});
  return json::parse(session.handle("load", args.dump(), {}, job).result);
}

Sample sample(std::vector<int64_t> ids, int images, uint64_t seed) {
  Sample out;
  out.input_ids = std::move(ids);
  for (int i = 0; i < images; ++i) out.images.push_back({randn({3, 8, 8}, seed + i), {}, false, 1.0});
  return out;
}

// Four image tokens for a picture of 8×8 in patches of 4×4.
Sample with_picture() { return sample({1, 5, kImageToken, kImageToken, kImageToken, kImageToken, 7, 2}, 1, 40); }

at::Tensor hidden_states(const VisionLanguageModel& model, const std::vector<const Sample*>& samples,
                         KvCache* cache = nullptr) {
  const at::NoGradGuard no_grad;
  const PackedBatch batch = pack(samples, model, at::kCPU);
  DecoderInput input = embed(model, batch, {}, false);
  if (cache != nullptr) input.pass.caches = {cache};
  return model.language_model().forward(input.hidden, input.pass);
}

}  // namespace

TEST("a whole checkpoint loads, in the spelling of transformers 5 and of 4") {
  auto weights = random_weights();
  int64_t parameters = 0;
  std::map<std::string, at::Tensor> old;
  for (const auto& [name, tensor] : weights) {
    parameters += tensor.numel();
    std::string key = name;
    const auto replace = [&](const std::string& from, const std::string& to) {
      if (key.rfind(from, 0) == 0) key = to + key.substr(from.size());
    };
    replace("lm_head.", "language_model.lm_head.");
    replace("model.language_model.", "language_model.model.");
    replace("model.vision_tower.", "vision_tower.vision_model.");
    replace("model.multi_modal_projector.", "multi_modal_projector.");
    EXPECT(key != name);
    old[key] = tensor;
  }
  EXPECT_EQ(load(weights)["parameters"].get<int64_t>(), parameters);
  EXPECT_EQ(load(old)["parameters"].get<int64_t>(), parameters);
  // Published files hold the vision layer that is never read.
  old["vision_tower.vision_model.post_layernorm.weight"] = randn({8}, 1);
  old["vision_tower.vision_model.encoder.layers.2.layer_norm1.weight"] = randn({8}, 1);
  EXPECT_EQ(load(old)["parameters"].get<int64_t>(), parameters);
}

TEST("a checkpoint that lacks tensors is ERR_MARTLET_WEIGHTS with their names") {
  auto weights = random_weights();
  weights.erase("model.language_model.layers.1.mlp.up_proj.weight");
  weights.erase("model.multi_modal_projector.linear_2.bias");
  const Error error = EXPECT_THROWS_CODE(code::kWeights, load(weights));
  const json missing = json::parse(error.details_json())["missing"];
  EXPECT_EQ(missing.size(), 2u);
  EXPECT_CONTAINS(error.what(), "model.language_model.layers.1.mlp.up_proj.weight");
  EXPECT_CONTAINS(error.what(), "model.multi_modal_projector.linear_2.bias");
}

TEST("a checkpoint with tensors of another model is ERR_MARTLET_WEIGHTS with their names") {
  auto weights = random_weights();
  weights["model.language_model.layers.2.mlp.up_proj.weight"] = randn({24, 16}, 1);
  weights["model.language_model.layers.0.self_attn.q_proj.bias"] = randn({16}, 1);
  const Error error = EXPECT_THROWS_CODE(code::kWeights, load(weights));
  EXPECT_EQ(json::parse(error.details_json())["unexpected"].size(), 2u);
  EXPECT_CONTAINS(error.what(), "model.language_model.layers.2.mlp.up_proj.weight");
  EXPECT_CONTAINS(error.what(), "model.language_model.layers.0.self_attn.q_proj.bias");
}

TEST("a tensor of another shape, and one under two spellings, are ERR_MARTLET_WEIGHTS with the name") {
  auto weights = random_weights();
  weights["model.language_model.norm.weight"] = randn({17}, 1);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, load(weights)).what(), "model.language_model.norm.weight");
  weights = random_weights();
  weights["language_model.model.norm.weight"] = randn({16}, 1);
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, load(weights)).what(), "language_model.model.norm.weight");
}

TEST("fp8: not loaded on the CPU, nor saved; sizes that it does not hold are named and stay as they are") {
  const auto weights = random_weights();
  const Error error =
      EXPECT_THROWS_CODE(code::kConfig, load(weights, {{"quantization", "fp8"}, {"dtype", "bfloat16"}}));
  EXPECT_CONTAINS(error.what(), "compute capability 9.0");
  EXPECT_CONTAINS(error.what(), "Leave base_dtype out");
  EXPECT_EQ(json::parse(error.details_json())["path"].get<std::string>(), "base_dtype");
  EXPECT_EQ(load(weights)["warnings"].size(), 0u);

  const TemporaryFolder folder;
  write_text_file(folder / "config.json", config().dump());
  write_safetensors(folder / "model.safetensors", {weights.begin(), weights.end()}, {{"format", "pt"}});
  const json args = {{"modelDir", folder.path().string()},
                     {"outputDir", (folder / "out").string()},
                     {"device", "cpu"},
                     {"dtype", "bfloat16"},
                     {"quantization", "fp8"}};
  JobContext job([](const std::string&) {});
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kConfig, quantize_checkpoint_json(args, job)).what(), "nf4 or int8");

  // Of 16: queries and attention's output. Keys and values have 8 rows, the MLP 24.
  const auto model = create();
  std::set<std::string> expected;
  for (const char* layer : {"0", "1"}) {
    for (const char* linear : {"q_proj", "o_proj"})
      expected.insert(std::string("model.language_model.layers.") + layer + ".self_attn." + linear + ".weight");
  }
  EXPECT(quantizable_weights(*model, QuantizationOptions::Method::kFp8) == expected);
  EXPECT_EQ(quantizable_weights(*model, QuantizationOptions::Method::kNf4).size(), 14u);
  const std::string warning = fp8_warning(*model);
  EXPECT_CONTAINS(warning, "leaves 10 weight(s) in bfloat16");
  for (const char* linear : {"self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
    EXPECT_CONTAINS(warning, std::string("model.language_model.layers.*.") + linear + ".weight");
  EXPECT_EQ(warning.find("q_proj"), std::string::npos);
}

TEST("packing: positions begin anew in each row, targets are the next labelled tokens of the same row") {
  const auto model = create();
  Sample one = with_picture(), two = sample({3, 4, 5}, 0, 0);
  one.labels = {kIgnored, kIgnored, kIgnored, kIgnored, kIgnored, kIgnored, 7, 2};
  two.labels = {3, 4, kIgnored};  // the first has no token before it
  const PackedBatch batch = pack({&one, &two}, *model, at::kCPU);
  EXPECT_SAME(batch.positions, at::tensor({0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2}, at::kLong));
  EXPECT_SAME(batch.image_rows, at::tensor({2, 3, 4, 5}, at::kLong));
  EXPECT_SAME(batch.predict_rows, at::tensor({5, 6, 8}, at::kLong));
  EXPECT_SAME(batch.targets, at::tensor({7, 2, 4}, at::kLong));
  EXPECT_SAME(batch.rows.cu_seqlens, at::tensor({0, 8, 11}, at::kInt));
  EXPECT_EQ(batch.images.size(), 1u);
  EXPECT_EQ(count_labelled(one) + count_labelled(two), batch.labelled);
}

TEST("packed rows have the hidden states that each has alone, pictures included") {
  const auto model = loaded();
  const Sample one = with_picture(), two = sample({3, 4, 5}, 0, 0), three = with_picture();
  const at::Tensor packed = hidden_states(*model, {&one, &two, &three});
  const at::Tensor alone =
      at::cat({hidden_states(*model, {&one}), hidden_states(*model, {&two}), hidden_states(*model, {&three})});
  EXPECT_CLOSE(packed, alone, 1e-5);
  // The picture must matter, or the comparison says nothing of it.
  Sample other = with_picture();
  other.images[0].pixels.neg_();
  EXPECT(!at::allclose(hidden_states(*model, {&other}), hidden_states(*model, {&one}), 0, 1e-3));
}

TEST("decoding token by token against the cache gives what one pass over the whole row gives") {
  const auto model = loaded();
  const at::NoGradGuard no_grad;
  Sample whole = with_picture();
  const int64_t prompt = static_cast<int64_t>(whole.input_ids.size());
  const std::vector<int64_t> answer = {11, 3, 16, 9};
  KvCache cache(model->language_model().config().num_layers);
  std::vector<at::Tensor> parts = {hidden_states(*model, {&whole}, &cache)};
  EXPECT_EQ(cache.length(), prompt);
  for (const int64_t id : answer) {
    DecoderPass pass;
    pass.caches = {&cache};
    const int64_t place = cache.length();
    model->language_model().place(pass, at::tensor({place}, at::kLong), {{1, place + 1, place}}, at::kFloat);
    parts.push_back(model->language_model().forward(model->language_model().embed(at::tensor({id}, at::kLong)), pass));
    whole.input_ids.push_back(id);
  }
  EXPECT_CLOSE(at::cat(parts), hidden_states(*model, {&whole}), 1e-5);
}

TEST(
    "what PEFT would match of the original model and this one lacks is excluded, by endings that mean no module here") {
  const auto model = loaded();
  const std::vector<std::string> absent = {"model.vision_tower.encoder.layers.7.mlp.fc1",
                                           "model.vision_tower.encoder.layers.7.self_attn.q_proj",
                                           "model.vision_tower.head.other"};
  const auto excluded = [&](const FreezeFlags& freeze) {
    return select_targets(*model, {"all-linear"}, "", freeze, absent).peft_excluded;
  };
  EXPECT(excluded({}).empty());  // the language model alone: the rule does not reach into the vision tower
  const std::vector<std::string> all = excluded({false, false, false});
  EXPECT_EQ(all.size(), 2u);
  model->visit([&](const std::string& path, Module&) {
    for (const std::string& name : all) EXPECT(!matches_name(path, name));
  });
  for (size_t i = 0; i < all.size(); ++i) EXPECT(matches_name(absent[i], all[i]));
}

TEST("every level of recompute gives the gradients of LoRA with dropout to the bit") {
  const auto model = loaded();
  AdapterConfig config;
  config.r = 2;
  config.lora_alpha = 4;
  config.lora_dropout = 0.3;
  const TargetSelection targets = select_targets(*model, {"all-linear"}, "", {});
  Adapter adapter = create_adapter(targets, config, {}, 5, at::kCPU);
  EXPECT_EQ(adapter.layers.size(), 14u);  // 7 linears in each of 2 layers
  uint64_t seed = 90;
  for (auto& [path, layer] : adapter.layers) {
    layer.a.requires_grad_(true);
    layer.b = randn(layer.b.sizes(), ++seed).requires_grad_(true);
  }
  activate(*model, &adapter);
  const Sample row = with_picture();
  const PackedBatch batch = pack({&row}, *model, at::kCPU);
  const auto gradients = [&](Recompute recompute) {
    DropoutSource dropout{make_generator(at::kCPU), 77};
    DecoderPass pass = embed(*model, batch, {}, false).pass;
    pass.options = {.dropout = &dropout, .recompute = recompute};
    at::Tensor input = embed(*model, batch, {}, false).hidden.detach().requires_grad_(true);
    for (auto& [path, layer] : adapter.layers) layer.a.mutable_grad() = layer.b.mutable_grad() = at::Tensor();
    torch::autograd::backward({model->language_model().forward(input, pass).pow(2).sum()});
    std::vector<at::Tensor> grads = {input.grad()};
    for (auto& [path, layer] : adapter.layers) {
      grads.push_back(layer.a.grad());
      grads.push_back(layer.b.grad());
    }
    return grads;
  };
  const auto plain = gradients(Recompute::kNone);
  for (const at::Tensor& gradient : plain) EXPECT(gradient.abs().sum().item<double>() > 0);
  for (const Recompute level : {Recompute::kCheap, Recompute::kMlp, Recompute::kLayer}) {
    const auto recomputed = gradients(level);
    for (size_t i = 0; i < plain.size(); ++i) EXPECT_SAME(recomputed[i], plain[i]);
  }
}

TEST(
    "a batch that cannot be is refused: ids outside the vocabulary, empty rows, image tokens and pictures that "
    "differ") {
  const auto model = loaded();
  const auto run = [&](const Sample& row) { return hidden_states(*model, {&row}); };
  for (const int64_t id : {int64_t{20}, int64_t{-1}, int64_t{1} << 40}) {
    Sample row = sample({1, id}, 0, 0);
    row.id = "row 12";
    EXPECT_CONTAINS(EXPECT_THROWS_CODE("ERR_MARTLET_TOKENIZER", run(row)).what(), "row 12");
  }
  EXPECT_THROWS_CODE(code::kConfig, run(sample({}, 0, 0)));
  EXPECT_THROWS_CODE(code::kImage, run(sample({1, kImageToken}, 0, 0)));
  EXPECT_THROWS_CODE(code::kImage, run(sample({1, kImageToken, kImageToken}, 1, 0)));
  Sample large = with_picture();
  large.images[0].pixels = randn({3, 12, 12}, 1);
  EXPECT_THROWS_CODE(code::kImage, run(large));
}
