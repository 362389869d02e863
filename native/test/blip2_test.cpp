// BLIP-2 with OPT and with T5 from the fixtures: what its parts give in transformers, and the passes that must agree.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "check.h"
#include "core/base/json.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"
#include "core/language/t5.h"
#include "core/models/registry.h"
#include "core/train/batch.h"

namespace martlet::test {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

const std::vector<std::string> kForms = {"opt", "t5"};
fs::path folder(const std::string& form) { return fs::path(MARTLET_FIXTURES) / ("blip2_" + form); }

std::unique_ptr<VisionLanguageModel> loaded(const std::string& form, at::ScalarType dtype = at::kFloat) {
  const fs::path dir = folder(form) / "model-new";
  const json config = read_json_file(dir / "config.json");
  const Checkpoint checkpoint = Checkpoint::open(dir.string());
  const std::set<std::string> names(checkpoint.names().begin(), checkpoint.names().end());
  const WeightSource weights = [&](const std::string& name) {
    return names.count(name) ? checkpoint.tensor(name) : at::Tensor();
  };
  auto model = family_for(config, dir.string()).create(config, weights);
  LoadOptions options;
  options.dtype = dtype;
  options.keeps_float32 = [&](const std::string& name) { return model->keeps_float32(name); };
  model->load(weights, options);
  model->verify();
  return model;
}

at::Tensor stored(const std::string& form, const std::string& file, const std::string& name) {
  return SafetensorsFile::open((folder(form) / file).string())->tensor(name);
}

Picture picture(const std::string& name) {
  Picture out;
  out.pixels = stored("opt", "pixels.safetensors", name + ".png");
  return out;
}

Sample row(const std::string& form, const std::string& name, const char* ids = "inputIds") {
  const json cases = read_json_file(folder(form) / "cases.json");
  for (const json& entry : cases["cases"]) {
    if (entry["name"] != name) continue;
    Sample out;
    out.id = name;
    out.input_ids = entry["default"][ids].get<std::vector<int64_t>>();
    out.decoder_labels = form == "t5";
    if (std::string(ids) == "inputIds") out.labels = entry["default"]["labels"].get<std::vector<int64_t>>();
    for (const json& image : entry["images"]) {
      Picture one;
      one.pixels = stored("opt", "pixels.safetensors", image.get<std::string>());
      out.images.push_back(one);
    }
    return out;
  }
  throw std::runtime_error("no case " + name);
}

}  // namespace

TEST("buckets of relative positions are those of transformers, in both directions") {
  const json expected = read_json_file(folder("t5") / "expected.json")["relativeBuckets"];
  const int64_t from = expected["from"].get<int64_t>();
  for (const auto& [key, values] : expected.items()) {
    if (key == "from") continue;
    int64_t buckets = 0, distance = 0;
    EXPECT_EQ(std::sscanf(key.c_str() + key.find('.'), ".%ld.%ld", &buckets, &distance), 2);
    const at::Tensor wanted = at::tensor(values.get<std::vector<int64_t>>(), at::kLong);
    const at::Tensor positions = at::arange(from, from + wanted.size(0), at::kLong);
    EXPECT_SAME(relative_buckets(positions, key.rfind("encoder", 0) == 0, buckets, distance), wanted);
  }
}

TEST("vision, each Q-Former layer, projection and T5's encoder give what they give in transformers") {
  for (const std::string& form : kForms) {
    const auto model = loaded(form);
    const at::NoGradGuard no_grad;
    std::map<const Module*, std::string> paths;
    model->visit([&](const std::string& path, Module& module) { paths.emplace(&module, path); });
    std::map<std::string, at::Tensor> seen;
    const OutputObserver observer([&](const Module& module, const at::Tensor& y) { seen[paths[&module]] = y; });
    for (const std::string name : {"landscape", "portrait"}) {
      const auto expected = [&](const std::string& part) {
        return stored(form, "expected.safetensors", part + "." + name);
      };
      const at::Tensor tokens = model->image_features({picture(name)}, {}).tokens;
      EXPECT_CLOSE(seen["vision_model.post_layernorm"], expected("vision"), 1e-4);
      for (int layer = 0; layer < 3; ++layer) {
        const std::string index = std::to_string(layer);
        EXPECT_CLOSE(seen["qformer.encoder.layer." + index + ".output_query.LayerNorm"], expected("qformer." + index),
                     1e-4);
      }
      EXPECT_CLOSE(tokens, expected("projection"), 1e-4);
    }
    if (form != "t5") continue;
    for (const std::string name : {"single", "text-only"}) {
      const Sample sample = row(form, name);
      const PackedBatch batch = pack({&sample}, *model, at::kCPU);
      const DecoderInput input = embed(*model, batch, {}, false);
      model->language_model().forward(input.hidden, input.pass);
      EXPECT_CLOSE(seen["language_model.encoder.final_layer_norm"],
                   stored(form, "expected.safetensors", "encoder." + name), 1e-4);
    }
  }
}

TEST("float16 leaves in float32 what transformers leaves, and nothing else; its numbers are near float32's") {
  for (const std::string& form : kForms) {
    const auto model = loaded(form, at::kHalf), whole = loaded(form);
    std::set<std::string> wide;
    model->visit_parameters([&](const std::string& name, Parameter& parameter) {
      if (parameter.dtype() == at::kFloat) wide.insert(name);
    });
    const json expected = read_json_file(folder(form) / "expected.json")["float16KeepsFloat32"];
    EXPECT_EQ(json(wide).dump(), expected.dump());
    const at::NoGradGuard no_grad;
    const auto states = [](const VisionLanguageModel& m, const Sample& sample) {
      const PackedBatch batch = pack({&sample}, m, at::kCPU);
      const DecoderInput input = embed(m, batch, {}, false);
      return m.language_model().head_input(m.language_model().forward(input.hidden, input.pass), {}).to(at::kFloat);
    };
    const Sample sample = row(form, "single");
    const at::Tensor want = states(*whole, sample);
    EXPECT((states(*model, sample) - want).norm().item<double>() < 1e-2 * want.norm().item<double>());
  }
}

TEST("packed rows have the states that each has alone; decoding step by step gives those of one pass") {
  for (const std::string& form : kForms) {
    const auto model = loaded(form);
    const LanguageModel& text = model->language_model();
    const at::NoGradGuard no_grad;
    const auto states = [&](const std::vector<const Sample*>& rows) {
      const PackedBatch batch = pack(rows, *model, at::kCPU);
      const DecoderInput input = embed(*model, batch, {}, false);
      return text.forward(input.hidden, input.pass);
    };
    const Sample one = row(form, "single"), two = row(form, "text-only"), three = row(form, "two-images");
    EXPECT_CLOSE(states({&one, &two, &three}), at::cat({states({&one}), states({&two}), states({&three})}), 1e-4);

    const Sample prompt = row(form, "single", "promptIds");
    const PackedBatch batch = pack({&prompt}, *model, at::kCPU);
    DecoderInput input = embed(*model, batch, {}, false);
    KvCache cache(text.config().num_layers);
    input.pass.caches = {&cache};
    std::vector<at::Tensor> parts = {text.forward(input.hidden, input.pass)};
    const std::vector<int64_t> answer = {11, 3, 16, 9, 5};
    for (const int64_t id : answer) {
      const int64_t at = cache.length();
      text.place(input.pass, at::tensor({at}, at::kLong), {{1, at + 1, batch.tokens}}, at::kFloat);
      parts.push_back(text.forward(text.embed(at::tensor({id}, at::kLong)), input.pass));
    }
    Sample whole = prompt;
    if (form == "t5") {
      whole.labels = answer;
      whole.labels.push_back(1);  // the last label is not read
    } else {
      whole.input_ids.insert(whole.input_ids.end(), answer.begin(), answer.end());
    }
    EXPECT_CLOSE(at::cat(parts), states({&whole}), 1e-4);
  }
}

}  // namespace martlet::test
