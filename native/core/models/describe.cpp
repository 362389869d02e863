#include "core/models/describe.h"

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/io/checkpoint.h"
#include "core/language/decoder.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"
#include "core/nn/linear.h"

namespace martlet {

using nlohmann::json;

namespace {

// What `auto` would load: from the weights where they are there, else as config.json says; null where it does not.
json natural_dtype(const std::string& dir, const json& config, const Family& family, const VisionLanguageModel& model) {
  try {
    const Checkpoint checkpoint = Checkpoint::open(dir);
    std::vector<std::pair<std::string, TensorInfo>> tensors;
    for (const std::string& name : checkpoint.names())
      tensors.emplace_back(family.canonical_key(name), checkpoint.info(name));
    return dtype_name(stored_dtype(model, tensors));
  } catch (const Error&) {
    // A description needs no weights; those that cannot be read are an error of whoever loads them.
  }
  for (const char* key : {"torch_dtype", "dtype"}) {
    for (const json& fields : {config, config.value("text_config", json::object())}) {
      const std::string name = fields.contains(key) && fields[key].is_string() ? fields[key].get<std::string>() : "";
      if (name == "float32" || name == "bfloat16" || name == "float16") return name;
    }
  }
  return nullptr;
}

// What run_frozen_layer() asks of the model itself.
bool takes_written_out(const DecoderConfig& c) {
  return c.norm == NormType::kRms && !c.plain_mlp && !c.position_offset && c.dropout == 0 && c.attention_dropout == 0;
}

}  // namespace

json describe_model_json(const json& args) {
  const std::string dir = args.at("modelDir").get<std::string>();
  const json config = read_json_file(std::filesystem::path(dir) / "config.json");
  const Family& family = family_for(config, dir);
  const auto model = family.create(config, [](const std::string&) { return at::Tensor(); });
  const auto part_name = [&](const std::string& path) {
    const Part part = model->part_of(path);
    return part == Part::kVision ? "vision" : part == Part::kProjector ? "projector" : "language";
  };
  const std::set<std::string> quantizable = quantizable_weights(*model);
  json parameters = json::array(), linears = json::array();
  model->visit_parameters([&](const std::string& name, Parameter& parameter) {
    parameters.push_back({{"name", name},
                          {"part", part_name(name)},
                          {"numel", parameter.numel()},
                          {"quantizable", quantizable.count(name) > 0}});
  });
  model->visit([&](const std::string& path, Module& module) {
    const auto* linear = dynamic_cast<const Linear*>(&module);
    if (linear == nullptr) return;
    linears.push_back(
        {{"path", path}, {"part", part_name(path)}, {"in", linear->in_features()}, {"out", linear->out_features()}});
  });
  const TextConfig& d = model->language_model().config();
  const auto* decoder = dynamic_cast<const Decoder*>(&model->language_model());
  return {{"family", model->info().family},
          {"modelType", model->info().model_type},
          {"dtype", natural_dtype(dir, config, family, *model)},
          {"parameters", parameters},
          {"linears", linears},
          {"decoder",
           {{"hiddenSize", d.hidden_size},
            {"intermediateSize", d.intermediate_size},
            {"layers", d.encoder_layers + d.num_layers},
            {"heads", d.num_heads},
            {"keyValueHeads", d.num_kv_heads},
            {"headDim", d.head_dim},
            {"vocabSize", d.vocab_size},
            {"rmsNorm", decoder == nullptr || decoder->config().norm == NormType::kRms},
            {"qkNorm", decoder != nullptr && decoder->config().qk_norm},
            {"writtenOut", decoder != nullptr && takes_written_out(decoder->config())}}}};
}

}  // namespace martlet
