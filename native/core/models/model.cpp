#include "core/models/model.h"

#include <ATen/ATen.h>
#include <torch/version.h>

#include <nlohmann/json.hpp>
#include <numeric>

#include "core/base/fingerprint.h"

namespace martlet {

RowPositions VisionLanguageModel::positions(const std::vector<int64_t>& input_ids, const std::vector<Picture>&,
                                            const std::string&) const {
  std::vector<int64_t> axis(input_ids.size());
  std::iota(axis.begin(), axis.end(), 0);
  return {{axis}, static_cast<int64_t>(axis.size())};
}

bool has_own_head(const TextConfig& text, const ModelInfo& info, const WeightSource& stored) {
  if (!text.tie_word_embeddings) return true;
  const at::Tensor head = stored(info.head_key), embedding = stored(info.embedding_key);
  return head.defined() && embedding.defined() && !at::equal(head, embedding);
}

std::string feature_fingerprint(VisionLanguageModel& model, const nlohmann::json& config, at::Device device) {
  Fingerprint print;
  print.add(config.dump());
  print.add(c10::DeviceTypeName(device.type()));
  print.add(TORCH_VERSION);
  print.add(MARTLET_VERSION);
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    const at::Tensor flat = tensor.to(at::kCPU).contiguous();
    print.add(name);
    print.add(c10::toString(flat.scalar_type()));
    print.add(flat.const_data_ptr(), flat.nbytes());
  };
  model.visit_parameters([&](const std::string& name, Parameter& parameter) {
    if (model.part_of(name) == Part::kLanguage) return;
    if (parameter.value.defined()) return add(name, parameter.value);
    for (const auto& [suffix, tensor] : parameter.quantized->stored()) add(name + suffix, tensor);
  });
  return print.hex();
}

}  // namespace martlet
