#include "core/models/describe.h"

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/io/checkpoint.h"
#include "core/language/decoder.h"
#include "core/language/t5.h"
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

// What the linears of the decoder's layers read: "norm1" (that before attention), "attention" (its output), "norm2"
// (that before the MLP) or "product" (the MLP's).
std::map<const Linear*, const char*> read_by_linears(const Decoder& decoder) {
  std::map<const Linear*, const char*> out;
  for (const auto& layer : decoder.layers) {
    for (const auto& linear : layer->self_attn.qkv) out[linear.get()] = "norm1";
    out[&layer->self_attn.o_proj] = "attention";
    if (const auto* gated = dynamic_cast<const GatedMlp*>(layer->mlp.get())) {
      out[&gated->gate_proj] = out[&gated->up_proj] = "norm2";
      out[&gated->down_proj] = "product";
    } else if (const auto* plain = dynamic_cast<const Mlp*>(layer->mlp.get())) {
      out[&plain->first] = "norm2";
      out[&plain->second] = "product";
    }
  }
  return out;
}

// What autograd keeps of an activation: its input, what it multiplies (SwiGLU: gate and up), or its result.
json describe_activation(const std::optional<Activation>& plain) {
  if (!plain) return {{"gated", true}, {"keeps", 2}, {"keepsResult", false}};
  if (*plain == Activation::kRelu) return {{"gated", false}, {"keeps", 0}, {"keepsResult", true}};
  return {{"gated", false}, {"keeps", *plain == Activation::kQuickGelu ? 2 : 1}, {"keepsResult", false}};
}

json describe_layers(const Decoder& decoder) {
  const DecoderConfig& c = decoder.config();
  const bool rms = c.norm == NormType::kRms;
  return {{"rmsNorm", rms},
          {"qkNorm", c.qk_norm},
          {"activation", describe_activation(c.plain_mlp)},
          {"dropout", c.dropout},
          {"learnedPositions", c.position_offset.has_value()},
          // what run_frozen_layer() asks of the model itself
          {"writtenOut", rms && !c.plain_mlp && !c.position_offset && c.dropout == 0 && c.attention_dropout == 0}};
}

// T5: its activation is a product of its own, which keeps what the inner one gives as well.
json describe_layers(const T5Config& c) {
  json activation = describe_activation(c.activation);
  if (c.gated_mlp) activation = {{"gated", true}, {"keeps", 3}, {"keepsResult", false}};
  return {
      {"rmsNorm", true}, {"qkNorm", false}, {"activation", activation}, {"dropout", c.dropout}, {"writtenOut", false}};
}

}  // namespace

json describe_model_json(const json& args) {
  const std::string dir = args.at("modelDir").get<std::string>();
  const json config = read_json_file(std::filesystem::path(dir) / "config.json");
  const Family& family = family_for(config, dir);
  const auto model = create_model(family, config, dir);
  const auto part_name = [&](const std::string& path) {
    const Part part = model->part_of(path);
    return part == Part::kVision ? "vision" : part == Part::kProjector ? "projector" : "language";
  };
  const std::set<std::string> quantizable = quantizable_weights(*model, QuantizationOptions::Method::kNone);
  const LanguageModel& language = model->language_model();
  const auto* decoder = dynamic_cast<const Decoder*>(&language);
  const auto read = decoder != nullptr ? read_by_linears(*decoder) : std::map<const Linear*, const char*>();
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
    json entry = {
        {"path", path}, {"part", part_name(path)}, {"in", linear->in_features()}, {"out", linear->out_features()}};
    if (const auto it = read.find(linear); it != read.end()) entry["reads"] = it->second;
    linears.push_back(std::move(entry));
  });
  const TextConfig& d = language.config();
  json layers =
      decoder != nullptr ? describe_layers(*decoder) : describe_layers(dynamic_cast<const T5&>(language).config());
  layers.update({{"hiddenSize", d.hidden_size},
                 {"intermediateSize", d.intermediate_size},
                 {"layers", d.encoder_layers + d.num_layers},
                 {"heads", d.num_heads},
                 {"keyValueHeads", d.num_kv_heads},
                 {"headDim", d.head_dim},
                 {"vocabSize", d.vocab_size},
                 {"tiedHead", model->has_tied_head()}});
  return {{"family", model->info().family},
          {"modelType", model->info().model_type},
          {"dtype", natural_dtype(dir, config, family, *model)},
          {"parameters", parameters},
          {"linears", linears},
          {"decoder", layers}};
}

}  // namespace martlet
