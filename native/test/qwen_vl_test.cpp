// Qwen2-VL, Qwen2.5-VL and Qwen3-VL: configurations, three-axis positions, features, and the passes that must agree.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/base/fs.h"
#include "core/base/json.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"
#include "core/lora/adapter.h"
#include "core/models/qwen_vl_common/config.h"
#include "core/models/registry.h"
#include "core/session.h"
#include "core/train/batch.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

const std::filesystem::path kFixtures = MARTLET_FIXTURES;
const std::vector<std::string> kFamilies = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"};

at::Tensor nothing(const std::string&) { return {}; }

int64_t parameters_of(const json& config) {
  int64_t total = 0;
  family_for(config, "").create(config, nothing)->visit_parameters([&](const std::string&, Parameter& p) {
    int64_t n = 1;
    for (const int64_t size : p.shape) n *= size;
    total += n;
  });
  return total;
}

// Flat, as the hub's files of Qwen2-VL and Qwen2.5-VL.
json flat_config(const char* type, int64_t hidden, int64_t intermediate, int64_t layers, int64_t heads,
                 int64_t kv_heads, int64_t vocab, bool tied, const json& vision) {
  return {{"model_type", type},
          {"hidden_size", hidden},
          {"intermediate_size", intermediate},
          {"num_hidden_layers", layers},
          {"num_attention_heads", heads},
          {"num_key_value_heads", kv_heads},
          {"vocab_size", vocab},
          {"tie_word_embeddings", tied},
          {"rope_theta", 1e6},
          {"rms_norm_eps", 1e-6},
          {"rope_scaling", {{"type", "mrope"}, {"mrope_section", {16, 24, 24}}}},
          {"vision_config", vision}};
}

json qwen2_5(int64_t hidden, int64_t intermediate, int64_t layers, int64_t heads, int64_t kv_heads, int64_t vocab,
             bool tied, int64_t vision_intermediate) {
  return flat_config("qwen2_5_vl", hidden, intermediate, layers, heads, kv_heads, vocab, tied,
                     {{"hidden_size", 1280}, {"out_hidden_size", hidden}, {"intermediate_size", vision_intermediate}});
}

json qwen3(int64_t hidden, int64_t intermediate, int64_t layers, int64_t heads, bool tied, json vision) {
  vision["out_hidden_size"] = hidden;
  return {
      {"model_type", "qwen3_vl"},
      {"tie_word_embeddings", tied},
      {"text_config",
       {{"hidden_size", hidden},
        {"intermediate_size", intermediate},
        {"num_hidden_layers", layers},
        {"num_attention_heads", heads},
        {"num_key_value_heads", 8},
        {"head_dim", 128},
        {"rope_theta", 5e6},
        {"rope_scaling", {{"mrope_interleaved", true}, {"mrope_section", {24, 20, 20}}, {"rope_type", "default"}}}}},
      {"vision_config", vision}};
}

// A family's fixture with its weights in float32.
std::unique_ptr<VisionLanguageModel> fixture_model(const std::string& name) {
  const std::filesystem::path dir = kFixtures / name / "model-4x";
  const json config = read_json_file(dir / "config.json");
  const Family& family = family_for(config, dir.string());
  const Checkpoint checkpoint = Checkpoint::open(dir);
  std::map<std::string, std::string> stored;
  for (const std::string& key : checkpoint.names()) stored[family.canonical_key(key)] = key;
  const WeightSource source = [&](const std::string& key) {
    const auto it = stored.find(key);
    return it == stored.end() ? at::Tensor() : checkpoint.tensor(it->second);
  };
  auto model = family.create(config, source);
  model->load(source, {});
  model->verify();
  return model;
}

Picture picture(PatchGrid grid, bool video = false, double seconds = 1.0, int64_t elements = 96, uint64_t seed = 1) {
  return {randn({grid.patches(), elements}, seed), grid, video, seconds};
}

at::Tensor as_tensor(const RowPositions& positions) {
  std::vector<at::Tensor> axes;
  for (const auto& axis : positions.axes) axes.push_back(at::tensor(axis, at::kLong));
  return at::stack(axes);
}

at::Tensor expected_axes(const std::vector<std::vector<int64_t>>& axes) { return as_tensor({axes, 0}); }

constexpr int64_t kImage = 364, kVideo = 365;

Sample sample(std::vector<int64_t> ids, std::vector<Picture> pictures) {
  Sample out;
  out.input_ids = std::move(ids);
  out.images = std::move(pictures);
  return out;
}

// Two pictures of different sizes, and a video of two temporal patches.
Sample mixed(const std::string& family) {
  std::vector<int64_t> ids = {5, 361};
  ids.insert(ids.end(), 2, kImage);
  ids.insert(ids.end(), {362, 9, 361});
  ids.insert(ids.end(), 15, kImage);
  ids.insert(ids.end(), {362, 361});
  ids.insert(ids.end(), 4, kVideo);
  if (family == "qwen3_vl") ids.insert(ids.end(), {362, 40, 361});
  ids.insert(ids.end(), 4, kVideo);
  ids.insert(ids.end(), {362, 7, 8});
  return sample(std::move(ids), {picture({1, 2, 4}, false, 1, 96, 2), picture({1, 6, 10}, false, 1, 96, 3),
                                 picture({2, 4, 4}, true, 1.5, 96, 4)});
}

at::Tensor hidden_states(const VisionLanguageModel& model, const std::vector<const Sample*>& samples,
                         KvCache* cache = nullptr) {
  const at::NoGradGuard no_grad;
  const PackedBatch batch = pack(samples, model, at::kCPU);
  DecoderInput input = embed(model, batch, {}, false);
  if (cache != nullptr) input.pass.caches = {cache};
  return model.language_model().forward(input.hidden, input.pass);
}

}  // namespace

TEST("published sizes are built from configurations with nothing but sizes: parameter counts of transformers 5.17") {
  const json qwen2_vision_2b = {{"hidden_size", 1536}}, qwen2_vision_7b = {{"hidden_size", 3584}};
  EXPECT_EQ(parameters_of(flat_config("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, true, qwen2_vision_2b)), 2208985600);
  EXPECT_EQ(parameters_of(flat_config("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, false, qwen2_vision_7b)), 8291375616);
  EXPECT_EQ(parameters_of(qwen2_5(2048, 11008, 36, 16, 2, 151936, true, 3420)), 3754622976);
  EXPECT_EQ(parameters_of(qwen2_5(3584, 18944, 28, 28, 4, 152064, false, 3420)), 8292166656);
  EXPECT_EQ(parameters_of(qwen2_5(5120, 27648, 64, 40, 8, 152064, false, 3456)), 33452718336);
  EXPECT_EQ(parameters_of(qwen2_5(8192, 29568, 80, 64, 8, 152064, false, 3456)), 73410777344);
  const json small_tower = {
      {"depth", 24}, {"hidden_size", 1024}, {"intermediate_size", 4096}, {"deepstack_visual_indexes", {5, 11, 17}}};
  EXPECT_EQ(parameters_of(qwen3(2048, 6144, 28, 16, true, small_tower)), 2127532032);
  EXPECT_EQ(parameters_of(qwen3(2560, 9728, 36, 32, true, small_tower)), 4437815808);
  EXPECT_EQ(parameters_of(qwen3(4096, 12288, 36, 32, false, json::object())), 8767123696);
}

TEST("a rope type that is not known is ERR_MARTLET_UNSUPPORTED_MODEL naming it, in either spelling") {
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    json config = flat_config("qwen2_vl", 64, 40, 2, 4, 2, 400, true, {{"embed_dim", 32}, {"hidden_size", 64}});
    config["rope_scaling"] = nullptr;
    config[key] = {{"rope_type", "yarn"}, {"factor", 4.0}, {"mrope_section", {2, 3, 3}}};
    const Error error = EXPECT_THROWS_CODE(code::kUnsupportedModel, parameters_of(config));
    EXPECT_CONTAINS(error.what(), "yarn");
    EXPECT_CONTAINS(error.what(), "Qwen2-VL");
  }
}

TEST("configurations whose sizes do not fit are ERR_MARTLET_UNSUPPORTED_MODEL naming the field") {
  const json good = qwen3(2048, 6144, 28, 16, true, {{"depth", 24}, {"deepstack_visual_indexes", {5, 11, 17}}});
  EXPECT(parameters_of(good) > 0);
  const auto message = [&](const char* path, const json& value) {
    json config = good;
    config[json::json_pointer(path)] = value;
    return std::string(EXPECT_THROWS_CODE(code::kUnsupportedModel, parameters_of(config)).what());
  };
  EXPECT_CONTAINS(message("/vision_config/deepstack_visual_indexes", {5, 24}), "deepstack_visual_indexes");
  EXPECT_CONTAINS(message("/vision_config/out_hidden_size", 1024), "1024");
  EXPECT_CONTAINS(message("/vision_config/num_heads", 17), "heads");
  EXPECT_CONTAINS(message("/vision_config/depth", 0), "depth");
  EXPECT_CONTAINS(message("/text_config/hidden_act", "gelu"), "gelu");
  EXPECT_CONTAINS(message("/text_config/rope_scaling/mrope_section", {24, 20}), "mrope_section");
  json flat = flat_config("qwen2_vl", 64, 40, 2, 4, 2, 400, true, {{"hidden_size", 64}});
  flat["rope_scaling"]["mrope_section"] = {2, 3, 4};
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kUnsupportedModel, parameters_of(flat)).what(), "head_dim / 2 = 8");
  flat["rope_scaling"]["mrope_section"] = {2, 3, 3};
  flat["use_sliding_window"] = true;
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kUnsupportedModel, parameters_of(flat)).what(), "use_sliding_window");
}

TEST("axes of the frequencies: in chunks, and interleaved as long as the sections last") {
  using qwen_vl_common::chunked_axes, qwen_vl_common::interleaved_axes;
  using Axes = std::vector<int64_t>;
  EXPECT(chunked_axes({2, 3, 3}, 8) == (Axes{0, 0, 1, 1, 1, 2, 2, 2}));
  EXPECT(interleaved_axes({6, 3, 3}, 12) == (Axes{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0}));
  EXPECT(interleaved_axes({3, 3, 2}, 8) == (Axes{0, 1, 2, 0, 1, 2, 0, 1}));
}

TEST("positions by hand: text, a picture of 2 × 3 tokens, text behind its longer side") {
  const auto model = fixture_model("qwen2_vl");
  std::vector<int64_t> ids = {1, 2};
  ids.insert(ids.end(), 6, kImage);
  ids.insert(ids.end(), {3, 4});
  const RowPositions row = model->positions(ids, {picture({1, 4, 6})}, "");
  EXPECT_SAME(
      as_tensor(row),
      expected_axes({{0, 1, 2, 2, 2, 2, 2, 2, 5, 6}, {0, 1, 2, 2, 2, 3, 3, 3, 5, 6}, {0, 1, 2, 3, 4, 2, 3, 4, 5, 6}}));
  EXPECT_EQ(row.next, 7);
}

TEST("positions by hand: a video counts frames, or seconds, or is split at its time stamps") {
  // Three temporal patches of 1 × 2 tokens.
  std::vector<int64_t> whole = {1};
  whole.insert(whole.end(), 6, kVideo);
  whole.push_back(2);
  const auto video = [](double seconds) { return picture({3, 2, 4}, true, seconds); };
  EXPECT_SAME(as_tensor(fixture_model("qwen2_vl")->positions(whole, {video(2.5)}, "")),
              expected_axes({{0, 1, 1, 2, 2, 3, 3, 3}, {0, 1, 1, 1, 1, 1, 1, 3}, {0, 1, 2, 1, 2, 1, 2, 3}}));
  // Two positions a second, 2.5 seconds cut to 2. The text goes on behind the longer side, not behind the time.
  const RowPositions timed = fixture_model("qwen2_5_vl")->positions(whole, {video(2.5)}, "");
  EXPECT_SAME(as_tensor(timed),
              expected_axes({{0, 1, 1, 5, 5, 9, 9, 3}, {0, 1, 1, 1, 1, 1, 1, 3}, {0, 1, 2, 1, 2, 1, 2, 3}}));
  EXPECT_EQ(timed.next, 10);
  const std::vector<int64_t> split = {1, kVideo, kVideo, 2, kVideo, kVideo, 3, kVideo, kVideo, 4};
  const RowPositions stamped = fixture_model("qwen3_vl")->positions(split, {video(2.5)}, "");
  EXPECT_SAME(
      as_tensor(stamped),
      expected_axes({{0, 1, 1, 3, 4, 4, 6, 7, 7, 9}, {0, 1, 1, 3, 4, 4, 6, 7, 7, 9}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}}));
}

TEST("placeholders that do not fit the pictures are ERR_MARTLET_IMAGE naming the row") {
  const auto model = fixture_model("qwen3_vl");
  const auto message = [&](const std::vector<int64_t>& ids, const std::vector<Picture>& pictures) {
    return std::string(EXPECT_THROWS_CODE(::martlet::code::kImage, model->positions(ids, pictures, "row 7")).what());
  };
  const Picture one = picture({1, 2, 2}), film = picture({2, 2, 2}, true);
  EXPECT_CONTAINS(message({1, kImage}, {}), "row 7");
  EXPECT_CONTAINS(message({1, kImage, kImage}, {one}), "no picture is left");
  EXPECT_CONTAINS(message({1, kImage}, {picture({1, 2, 4})}), "gives 2");
  EXPECT_CONTAINS(message({1, kImage}, {one, one}), "fewer");
  EXPECT_CONTAINS(message({1, kVideo, 2}, {film}), "fewer");
  EXPECT_CONTAINS(message({1, kVideo}, {one}), "what comes next in it is a picture");
}

TEST("positions and features of the fixtures are those of transformers 5.17") {
  for (const std::string& name : kFamilies) {
    const auto model = fixture_model(name);
    const auto expected = SafetensorsFile::open(kFixtures / name / "expected.safetensors");
    const auto pixels = SafetensorsFile::open(kFixtures / name / "pixels.safetensors");
    const json deltas = read_json_file(kFixtures / name / "expected.json").at("ropeDeltas");
    for (const json& row : read_json_file(kFixtures / name / "cases.json").at("cases")) {
      const auto ids = row.at("default").at("inputIds").get<std::vector<int64_t>>();
      const std::string id = row.at("name");
      std::vector<Picture> images, videos;
      const auto grid_of = [](const json& g) { return PatchGrid{g[0], g[1], g[2]}; };
      for (const json& grid : row.at("imageGrids")) images.push_back(picture(grid_of(grid)));
      for (size_t i = 0; i < row.at("videoGrids").size(); ++i) {
        const double seconds = row.contains("secondPerGrid") ? row["secondPerGrid"][i].get<double>() : 1.0;
        videos.push_back(picture(grid_of(row["videoGrids"][i]), true, seconds));
      }
      // Its only row with both has the video first.
      std::vector<Picture> pictures = videos;
      pictures.insert(pictures.end(), images.begin(), images.end());
      const RowPositions positions = model->positions(ids, pictures, id);
      EXPECT_SAME(as_tensor(positions).to(at::kFloat), expected->tensor("positions." + id));
      EXPECT_EQ(positions.next - static_cast<int64_t>(ids.size()), deltas.at(id).get<int64_t>());
    }
    const at::Tensor grid = pixels->tensor("grid.video")[0];
    const auto side = [&](int64_t i) { return static_cast<int64_t>(grid[i].item<float>()); };
    const at::NoGradGuard no_grad;
    const VisionFeatures features =
        model->image_features({{pixels->tensor("video"), {side(0), side(1), side(2)}, true, 1.0}}, {});
    EXPECT_CLOSE(features.tokens, expected->tensor("features.video"), 1e-4);
    EXPECT_EQ(features.deepstack.size(), name == "qwen3_vl" ? 2u : 0u);
    for (size_t i = 0; i < features.deepstack.size(); ++i)
      EXPECT_CLOSE(features.deepstack[i], expected->tensor("deepstack." + std::to_string(i) + ".video"), 1e-4);
  }
}

TEST("pictures of several sizes go through the tower together as each alone") {
  for (const std::string& name : kFamilies) {
    const auto model = fixture_model(name);
    const at::NoGradGuard no_grad;
    const std::vector<Picture> pictures = mixed(name).images;
    const VisionFeatures together = model->image_features(pictures, {});
    int64_t start = 0;
    for (const Picture& one : pictures) {
      const VisionFeatures alone = model->image_features({one}, {});
      const int64_t n = alone.tokens.size(0);
      EXPECT_CLOSE(together.tokens.narrow(0, start, n), alone.tokens, 1e-5);
      for (size_t i = 0; i < alone.deepstack.size(); ++i)
        EXPECT_CLOSE(together.deepstack[i].narrow(0, start, n), alone.deepstack[i], 1e-5);
      start += n;
    }
    EXPECT_EQ(start, together.tokens.size(0));
  }
}

TEST("packed rows have the hidden states that each has alone: pictures, a video, text") {
  for (const std::string& name : kFamilies) {
    const auto model = fixture_model(name);
    const Sample one = mixed(name), two = sample({3, 4, 5}, {});
    const at::Tensor alone = at::cat({hidden_states(*model, {&one}), hidden_states(*model, {&two})});
    EXPECT_CLOSE(hidden_states(*model, {&one, &two}), alone, 1e-4);
    EXPECT_CLOSE(hidden_states(*model, {&two, &one}).narrow(0, 3, one.input_ids.size()),
                 alone.narrow(0, 0, one.input_ids.size()), 1e-4);
  }
}

TEST("decoding goes on at the row's next position and gives what one pass over the whole row gives") {
  for (const std::string& name : kFamilies) {
    const auto model = fixture_model(name);
    const at::NoGradGuard no_grad;
    Sample whole = mixed(name);
    KvCache cache(model->language_model().config().num_layers);
    std::vector<at::Tensor> parts = {hidden_states(*model, {&whole}, &cache)};
    int64_t position = pack({&whole}, *model, at::kCPU).next_positions[0];
    EXPECT(position < cache.length());  // pictures take fewer positions than tokens
    for (const int64_t id : {11, 3, 16}) {
      DecoderPass pass;
      pass.caches = {&cache};
      model->language_model().place(pass, at::tensor({position}, at::kLong), {{1, position + 1, cache.length()}},
                                    at::kFloat);
      ++position;
      parts.push_back(
          model->language_model().forward(model->language_model().embed(at::tensor({id}, at::kLong)), pass));
      whole.input_ids.push_back(id);
    }
    EXPECT_CLOSE(at::cat(parts), hidden_states(*model, {&whole}), 1e-4);
  }
}

TEST("targets are described so that PEFT takes neither the patch convolution nor a whole block for one") {
  for (const std::string& name : kFamilies) {
    const auto model = fixture_model(name);
    // The tower has modules of the language model's names, and PEFT would take its convolution for `proj`.
    const TargetSelection language = select_targets(*model, {"all-linear"}, "", {});
    EXPECT_EQ(language.linears.size(), 21u);
    const TargetSelection vision = select_targets(*model, {"all-linear"}, "", {false, true, true});
    EXPECT(std::find(vision.peft_names.begin(), vision.peft_names.end(), "proj") == vision.peft_names.end());
    EXPECT_EQ(vision.peft_regex.rfind("(?:.*\\.)?blocks\\.", 0), 0u);
    for (const auto& [path, linear] : vision.linears) EXPECT(model->part_of(path) == Part::kVision);
    // `mlp.0` of the merger must not stand for the tower's block 0.
    const TargetSelection merger = select_targets(*model, {"all-linear"}, "", {true, false, true});
    EXPECT(std::find(merger.peft_names.begin(), merger.peft_names.end(), "0") == merger.peft_names.end());
    const TargetSelection all = select_targets(*model, {"all-linear"}, "", {false, false, false});
    EXPECT_EQ(all.linears.size(), language.linears.size() + vision.linears.size() + merger.linears.size());
  }
}

TEST("a tied head that a file holds too is the embedding: trained once, saved twice") {
  const TemporaryFolder folder, out;
  const std::filesystem::path dir = kFixtures / "qwen2_vl" / "model-4x";
  write_text_file(folder / "config.json", read_bytes(dir / "config.json"));
  const Checkpoint checkpoint = Checkpoint::open(dir);
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const std::string& key : checkpoint.names()) tensors.emplace_back(key, checkpoint.tensor(key).to(at::kFloat));
  const at::Tensor embedding = checkpoint.tensor("model.embed_tokens.weight").to(at::kFloat);
  tensors.emplace_back("lm_head.weight", embedding);
  write_safetensors(folder / "model.safetensors", tensors, {{"format", "pt"}});

  Session session;
  JobContext job([](const std::string&) {});
  std::vector<int32_t> ids = {5, 6, 7, 8};
  const BufferView view = {reinterpret_cast<const uint8_t*>(ids.data()), ids.size() * sizeof(int32_t)};
  const auto call = [&](const char* method, const json& args) {
    return json::parse(session.handle(method, args.dump(), {view}, job).result);
  };
  const json loaded = call("load", {{"modelDir", folder.path().string()}, {"device", "cpu"}, {"dtype", "float32"}});
  int64_t alone = 0;
  for (const auto& [key, tensor] : tensors) alone += tensor.numel();
  EXPECT_EQ(loaded["parameters"].get<int64_t>(), alone - embedding.numel());
  call("train.begin",
       {{"method", "full"},
        {"freeze", {{"vision", true}, {"projector", true}, {"language", false}}},
        {"optimizer", {{"name", "adamw"}, {"beta1", 0.9}, {"beta2", 0.99}, {"epsilon", 1e-8}, {"weightDecay", 0}}},
        {"schedule", {{"type", "constant"}, {"warmupSteps", 0}, {"totalSteps", 1}}},
        {"learningRate", 1e-2},
        {"maxGradNorm", 0},
        {"recompute", "none"},
        {"seed", 1}});
  const json row = {{"inputIds", 0}, {"labels", 0}, {"images", json::array()}};
  call("train.step", {{"microBatches", {json::array({row})}}});
  call("train.save", {{"dir", out.path().string()}, {"baseModel", ""}, {"maxShardSize", 1 << 30}});
  const Checkpoint saved = Checkpoint::open(out.path());
  EXPECT_SAME(saved.tensor("lm_head.weight"), saved.tensor("model.embed_tokens.weight"));
  EXPECT(!at::equal(saved.tensor("lm_head.weight"), embedding));
}
