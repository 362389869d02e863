// Tiny Qwen-VL and MiniCPM-V with random weights: passes that must agree with each other, and configs that are refused.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"
#include "core/nn/attention.h"
#include "core/train/batch.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

json qwen_vl() {
  return {{"model_type", "qwen"},
          {"vocab_size", 40},
          {"hidden_size", 128},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 2},
          {"kv_channels", 64},
          {"intermediate_size", 64},
          {"seq_length", 12},
          {"max_position_embeddings", 256},
          {"visual",
           {{"heads", 2},
            {"image_size", 18},
            {"image_start_id", 30},
            {"layers", 2},
            {"mlp_ratio", 2.0},
            {"n_queries", 4},
            {"output_dim", 128},
            {"patch_size", 4},
            {"width", 24}}}};
}

json minicpm_v(double version = 2.6) {
  json config = {{"model_type", "minicpmv"},
                 {"version", version},
                 {"vocab_size", 40},
                 {"hidden_size", 128},
                 {"intermediate_size", 48},
                 {"num_hidden_layers", 2},
                 {"num_attention_heads", 4},
                 {"num_key_value_heads", 2},
                 {"max_position_embeddings", 256},
                 {"rope_theta", 1e6},
                 {"query_num", 4},
                 {"image_token_id", 32},
                 {"drop_vision_last_layer", false},
                 {"vision_config",
                  {{"hidden_size", 24},
                   {"intermediate_size", 32},
                   {"num_hidden_layers", 2},
                   {"num_attention_heads", 2},
                   {"image_size", 28},
                   {"patch_size", 4}}}};
  if (version > 4) config["head_dim"] = 48;
  return config;
}

std::unique_ptr<VisionLanguageModel> create(const json& config) {
  return family_for(config, "").create(config, [](const std::string&) { return at::Tensor(); });
}

std::unique_ptr<VisionLanguageModel> loaded(const json& config) {
  auto model = create(config);
  uint64_t seed = 0;
  std::map<std::string, at::Tensor> weights;
  model->visit_parameters([&](const std::string& name, Parameter& p) { weights[name] = randn(p.shape, ++seed) * 0.2; });
  model->load([&](const std::string& name) { return weights.at(name); }, {});
  model->verify();
  return model;
}

// A row with pictures of these sizes in patches; 4 places each.
Sample row(const VisionLanguageModel& model, const std::vector<std::pair<int64_t, int64_t>>& pictures, uint64_t seed,
           int64_t words = 5) {
  Sample out;
  const int64_t place = model.info().image_token_id;
  const bool square = model.info().family == "qwen_vl";
  out.input_ids = {1, 2};
  for (const auto& [h, w] : pictures) {
    Picture picture;
    if (square) {
      picture.pixels = randn({3, 18, 18}, ++seed);
    } else {
      picture.grid = {1, h, w};
      picture.pixels = randn({h * w, 48}, ++seed);
    }
    out.images.push_back(picture);
    out.input_ids.insert(out.input_ids.end(), 4, place);
    out.input_ids.push_back(3);
  }
  for (int64_t i = 0; i < words; ++i) out.input_ids.push_back((i * 7 + static_cast<int64_t>(seed)) % 20 + 4);
  return out;
}

DecoderInput start(const VisionLanguageModel& model, const PackedBatch& batch, const ForwardOptions& options = {}) {
  return embed(model, batch, options, false);
}

at::Tensor states(const VisionLanguageModel& model, const std::vector<const Sample*>& rows) {
  const at::NoGradGuard no_grad;
  const PackedBatch batch = pack(rows, model, at::kCPU);
  const DecoderInput input = start(model, batch);
  return model.language_model().forward(input.hidden, input.pass);
}

const std::vector<json> kConfigs = {qwen_vl(), minicpm_v(), minicpm_v(4.5)};

}  // namespace

TEST("packed rows with pictures of different sizes and numbers have the states that each has alone") {
  for (const json& config : kConfigs) {
    const auto model = loaded(config);
    const Sample one = row(*model, {{2, 3}, {4, 1}}, 1), two = row(*model, {}, 2, 20), three = row(*model, {{5, 5}}, 3);
    const at::Tensor packed = states(*model, {&one, &two, &three});
    EXPECT_CLOSE(packed, at::cat({states(*model, {&one}), states(*model, {&two}), states(*model, {&three})}), 2e-5);
    Sample other = three;
    other.images[0].pixels = other.images[0].pixels + 1;
    EXPECT((states(*model, {&other}) - states(*model, {&three})).abs().max().item<double>() > 1e-3);
  }
}

TEST("decoding token by token gives what one pass over the whole row gives, as long as the prompt's base stays") {
  for (json config : kConfigs) {
    // A generated token keeps the prompt's rotary base; without that rule both ways are one.
    config["use_dynamic_ntk"] = false;
    const auto model = loaded(config);
    const at::NoGradGuard no_grad;
    Sample whole = row(*model, {{2, 3}}, 1, 4);
    const PackedBatch batch = pack({&whole}, *model, at::kCPU);
    DecoderInput input = start(*model, batch);
    const LanguageModel& decoder = model->language_model();
    KvCache cache(decoder.config().num_layers);
    input.pass.caches = {&cache};
    std::vector<at::Tensor> parts = {decoder.forward(input.hidden, input.pass)};
    const int64_t prompt = batch.tokens;
    for (const int64_t id : {11, 3, 16, 9, 5}) {
      DecoderPass pass;
      pass.caches = {&cache};
      const int64_t at = cache.length();
      decoder.place(pass, at::tensor({at}, at::kLong), {{1, at + 1, prompt}}, at::kFloat);
      parts.push_back(decoder.forward(decoder.embed(at::tensor({id}, at::kLong)), pass));
      whole.input_ids.push_back(id);
    }
    EXPECT_CLOSE(at::cat(parts), states(*model, {&whole}), 2e-5);
  }
}

TEST("long prompts: the rotary base and the scale of queries follow the original's rule, at inference only") {
  const auto model = create(qwen_vl());  // trained on 12 tokens
  const LanguageModel& decoder = model->language_model();
  const auto placed = [&](int64_t tokens, int64_t prompt) {
    DecoderPass pass;
    decoder.place(pass, at::arange(tokens, at::kLong), {{tokens, tokens, prompt}}, at::kFloat);
    return pass;
  };
  const auto base = [&](const DecoderPass& pass) {
    // Angle of the second frequency at position 1: base^(−2/d).
    const double angle = std::asin(pass.rotary.sin[1][0][1].item<double>());
    return std::pow(angle, -32.0);
  };
  const auto expected = [](double alpha) { return 10000.0 * std::pow(alpha, 64.0 / 62.0); };
  for (const auto& [prompt, alpha] : std::map<int64_t, double>{{5, 1}, {12, 1}, {13, 3}, {24, 3}, {25, 7}, {49, 15}}) {
    EXPECT_CLOSE(base(placed(prompt, prompt)) / expected(alpha), 1.0, 1e-4);
    EXPECT_CLOSE(base(placed(prompt, 0)) / expected(1), 1.0, 1e-4);
  }
  EXPECT(!placed(12, 12).query_scale.defined());
  EXPECT(!placed(30, 0).query_scale.defined());
  const at::Tensor scale = placed(30, 30).query_scale.flatten();
  EXPECT_CLOSE(scale[11].item<double>(), 1.0, 0);
  EXPECT_CLOSE(scale[12].item<double>(), std::log(13.0) / std::log(12.0), 1e-6);
  EXPECT_CLOSE(scale[29].item<double>(), std::log(30.0) / std::log(12.0), 1e-6);
}

TEST("recomputing layers in the backward pass changes no gradient of tower, resampler or decoder") {
  for (const json& config : kConfigs) {
    const auto model = loaded(config);
    std::vector<at::Tensor> leaves;
    model->visit_parameters([&](const std::string&, Parameter& p) {
      if (p.fixed) return;
      p.value.requires_grad_(true);
      leaves.push_back(p.value);
    });
    const Sample one = row(*model, {{2, 3}, {3, 3}}, 1), two = row(*model, {{1, 4}}, 2);
    const auto gradients = [&](bool recompute) {
      const PackedBatch batch = pack({&one, &two}, *model, at::kCPU);
      ForwardOptions options;
      options.recompute = recompute ? Recompute::kLayer : Recompute::kNone;
      options.training = true;
      const DecoderInput input = embed(*model, batch, options, true);
      const at::Tensor out =
          model->language_model().head_input(model->language_model().forward(input.hidden, input.pass), options);
      const at::Tensor loss = at::linear(out, model->head_weight()).square().mean();
      for (at::Tensor& leaf : leaves) leaf.mutable_grad().reset();
      torch::autograd::backward({loss}, {});
      std::vector<at::Tensor> out_grads;
      for (const at::Tensor& leaf : leaves) out_grads.push_back(leaf.grad().clone());
      return out_grads;
    };
    const auto kept = gradients(false), again = gradients(true);
    for (size_t i = 0; i < kept.size(); ++i) EXPECT_CLOSE(again[i], kept[i], 1e-6);
  }
}

TEST("what is a table of the checkpoint and no parameter is marked as such") {
  std::vector<std::string> fixed;
  create(qwen_vl())->visit_parameters([&](const std::string& name, Parameter& p) {
    if (p.fixed) fixed.push_back(name);
  });
  EXPECT(fixed == std::vector<std::string>{"transformer.visual.attn_pool.pos_embed"});
}

TEST("parts: the resampler and what follows it are the projector") {
  const auto model = create(qwen_vl());
  for (const char* name :
       {"transformer.visual.attn_pool.query", "transformer.visual.attn_pool.attn.out_proj",
        "transformer.visual.ln_post", "transformer.visual.ln_post.weight", "transformer.visual.proj"}) {
    EXPECT(model->part_of(name) == Part::kProjector);
  }
  for (const char* name : {"transformer.visual.ln_pre.weight", "transformer.visual.conv1.weight",
                           "transformer.visual.transformer.resblocks.0.mlp.c_proj"}) {
    EXPECT(model->part_of(name) == Part::kVision);
  }
  EXPECT(model->part_of("transformer.h.0.attn.c_attn") == Part::kLanguage &&
         model->part_of("lm_head") == Part::kLanguage);
  const auto mini = create(minicpm_v());
  EXPECT(mini->part_of("resampler.proj") == Part::kProjector && mini->part_of("vpm.post_layernorm") == Part::kVision &&
         mini->part_of("llm.lm_head") == Part::kLanguage);
}

TEST("configs that are not supported are refused, and say what is") {
  const auto refused = [](const json& config, const std::string& part) {
    EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kUnsupportedModel, create(config)).what(), part);
  };
  const auto with = [](json config, const json& changes) {
    config.merge_patch(changes);
    return config;
  };
  for (const auto& [version, name] :
       std::map<double, const char*>{{2.0, "2.0"}, {2.5, "2.5"}, {4.0, "4.0"}, {4.6, "4.6"}}) {
    refused(minicpm_v(version), std::string("MiniCPM-V ") + name);
    refused(minicpm_v(version), "Supported: 2.6 and 4.5");
  }
  refused(with(minicpm_v(), {{"model_type", "minicpmv4_6"}}), "MiniCPM-V 4.6");
  refused(with(minicpm_v(), {{"version", nullptr}, {"query_num", 96}}), "MiniCPM-V 2.5");
  refused(with(minicpm_v(), {{"version", nullptr}, {"vision_encoder", "vit"}}), "MiniCPM-V 2.0");
  create(with(minicpm_v(), {{"version", nullptr}}));
  refused(with(minicpm_v(), {{"hidden_size", 120}}), "multiple of 128");
  refused(with(minicpm_v(), {{"use_sliding_window", true}}), "use_sliding_window");
  refused(with(minicpm_v(), {{"vision_config", {{"image_size", 2}}}}), "vision_config");
  refused(with(qwen_vl(), {{"visual", nullptr}}), "Qwen without eyes");
  refused(with(qwen_vl(), {{"rotary_pct", 0.5}}), "rotary_pct");
  refused(with(qwen_vl(), {{"kv_channels", 32}}), "kv_channels");
  refused(with(qwen_vl(), {{"visual", {{"output_dim", 256}}}}), "hidden_size is 128");
  refused(with(qwen_vl(), {{"visual", {{"n_queries", 5}}}}), "square");
  refused(with(qwen_vl(), {{"visual", {{"image_size", -1}}}}), "image_size");
  refused(with(qwen_vl(), {{"seq_length", "long"}}), "seq_length");
}

TEST("attention of rows of queries to rows of keys of other lengths, with gradients") {
  const auto q_rows = SequenceLengths::from_lengths({2, 2, 3}, at::kCPU);
  const auto k_rows = SequenceLengths::from_lengths({4, 1, 4}, at::kCPU);
  const auto leaf = [](int64_t rows, uint64_t seed) { return randn({rows, 2, 4}, seed).requires_grad_(true); };
  const at::Tensor q = leaf(7, 1), k = leaf(9, 2), v = leaf(9, 3);
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < 3; ++i) {
    const auto part = [&](const at::Tensor& x, const SequenceLengths& rows) {
      return x.slice(0, rows.offsets[i], rows.offsets[i + 1]).transpose(0, 1).to(at::kDouble);
    };
    const at::Tensor weights = at::softmax(at::matmul(part(q, q_rows), part(k, k_rows).transpose(1, 2)) / 2.0, -1);
    parts.push_back(at::matmul(weights, part(v, k_rows)).transpose(0, 1));
  }
  const at::Tensor expected = at::cat(parts), actual = packed_attention(q, k, v, q_rows, k_rows, /*causal=*/false);
  EXPECT_CLOSE(actual, expected, 1e-6);
  const at::Tensor dy = randn(actual.sizes(), 4);
  const auto expected_grads = torch::autograd::grad({expected}, {q, k, v}, {dy.to(at::kDouble)});
  const auto grads = torch::autograd::grad({actual}, {q, k, v}, {dy});
  for (size_t i = 0; i < grads.size(); ++i) EXPECT_CLOSE(grads[i], expected_grads[i], 1e-5);
}

TEST("quantisation takes the language model's linears and leaves the head, whatever its name") {
  for (const json& config : {qwen_vl(), minicpm_v(), minicpm_v(4.5)}) {
    auto model = create(config);
    const std::set<std::string> chosen = quantizable_weights(*model, QuantizationOptions::Method::kNf4);
    EXPECT(!chosen.empty());
    int64_t heads = 0;
    model->visit_parameters([&](const std::string& name, Parameter&) { heads += name == model->info().head_key; });
    EXPECT_EQ(heads, 1);
    EXPECT(!chosen.count(model->info().head_key));
  }
}
