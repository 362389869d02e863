#include "core/models/describe.h"

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"
#include "core/nn/linear.h"

namespace martlet {

using nlohmann::json;

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
  return {{"family", model->info().family},
          {"modelType", model->info().model_type},
          {"parameters", parameters},
          {"linears", linears},
          {"decoder",
           {{"hiddenSize", d.hidden_size},
            {"intermediateSize", d.intermediate_size},
            {"layers", d.encoder_layers + d.num_layers},
            {"heads", d.num_heads},
            {"keyValueHeads", d.num_kv_heads},
            {"headDim", d.head_dim},
            {"vocabSize", d.vocab_size}}}};
}

}  // namespace martlet
