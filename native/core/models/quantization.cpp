#include "core/models/quantization.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <map>
#include <nlohmann/json.hpp>
#include <regex>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/runtime.h"
#include "core/io/safetensors.h"
#include "core/models/registry.h"
#include "core/nn/linear.h"
#include "core/quant/fp8.h"
#include "core/quant/nf4.h"

namespace martlet {

using nlohmann::json;

std::set<std::string> quantizable_weights(VisionLanguageModel& model, QuantizationOptions::Method method) {
  std::set<std::string> names;
  model.visit([&](const std::string& path, Module& module) {
    const auto* linear = dynamic_cast<const Linear*>(&module);
    if (linear == nullptr || model.info().is_head(path) || model.part_of(path) != Part::kLanguage ||
        model.keeps_float32(path + ".weight"))
      return;
    if (method == QuantizationOptions::Method::kFp8 && !Fp8Tensor::fits(linear->weight.shape)) return;
    names.insert(path + ".weight");
  });
  return names;
}

std::string fp8_warning(VisionLanguageModel& model) {
  const std::set<std::string> held = quantizable_weights(model, QuantizationOptions::Method::kFp8);
  std::set<std::string> left;
  size_t count = 0;
  for (const std::string& name : quantizable_weights(model, QuantizationOptions::Method::kNone)) {
    if (held.count(name)) continue;
    ++count;
    left.insert(std::regex_replace(name, std::regex("\\.[0-9]+\\."), ".*."));
  }
  if (left.empty()) return "";
  std::string list;
  for (const std::string& name : left) list += (list.empty() ? "" : ", ") + name;
  return "base_dtype: fp8 leaves " + std::to_string(count) +
         " weight(s) in bfloat16, whose rows or columns are no multiple of " + std::to_string(Fp8Tensor::kExtent) +
         ": " + list + ".";
}

at::ScalarType stored_dtype(const VisionLanguageModel& model,
                            const std::vector<std::pair<std::string, TensorInfo>>& tensors) {
  at::ScalarType dtype = at::kFloat;
  size_t largest = 0;
  for (const auto& [name, info] : tensors) {
    if (info.nbytes() <= largest || model.part_of(name) != Part::kLanguage) continue;
    largest = info.nbytes();
    dtype = info.dtype == at::kBFloat16 || info.dtype == at::kHalf ? info.dtype : at::kFloat;
  }
  return dtype;
}

DenseCheckpoint::DenseCheckpoint(const std::string& dir) : checkpoint_(Checkpoint::open(dir)) {
  stored_.insert(checkpoint_.names().begin(), checkpoint_.names().end());
  for (const std::string& name : checkpoint_.names()) {
    if (!stored_.count(quantized_owner(name))) {
      names_.push_back(name);
    } else {
      quantized_ = true;
    }
  }
}

at::Tensor DenseCheckpoint::part(const std::string& name) const {
  return stored_.count(name) ? checkpoint_.tensor(name) : at::Tensor();
}

bool DenseCheckpoint::is_quantized(const std::string& name) const {
  return stored_.count(name + Nf4Tensor::kStateSuffix) || stored_.count(quantized_part_name(name, ".SCB"));
}

TensorInfo DenseCheckpoint::info(const std::string& name) const {
  TensorInfo info = checkpoint_.info(name);
  if (!is_quantized(name)) return info;
  const at::Tensor state = part(name + Nf4Tensor::kStateSuffix);
  if (!state.defined()) {
    // bitsandbytes' int8 does not say; float16 is what it computes in.
    info.dtype = at::kHalf;
    return info;
  }
  const at::Tensor text = state.contiguous();
  const auto* begin = static_cast<const char*>(text.const_data_ptr());
  const json fields = json::parse(begin, begin + text.nbytes(), nullptr, /*allow_exceptions=*/false);
  if (!fields.is_object() || !fields.contains("shape") || !fields.contains("dtype"))
    fail(code::kWeights, "The quantised tensor " + name + " has no state that can be read.", {{"key", name}});
  info.shape = fields["shape"].get<std::vector<int64_t>>();
  info.dtype = parse_dtype(fields["dtype"].get<std::string>());
  return info;
}

at::Tensor DenseCheckpoint::tensor(const std::string& name) const {
  if (!is_quantized(name)) return checkpoint_.tensor(name);
  const TensorInfo shape = info(name);
  return read_quantized(
             name, [&](const std::string& suffix) { return part(quantized_part_name(name, suffix)); }, shape.shape,
             shape.dtype, at::kCPU)
      ->dequantize();
}

json quantize_checkpoint_json(const json& args, JobContext& job) {
  const at::NoGradGuard no_grad;
  const std::string model_dir = args.at("modelDir").get<std::string>();
  const json config = read_json_file(std::filesystem::path(model_dir) / "config.json");
  const Family& family = family_for(config, model_dir);
  const DenseCheckpoint base(model_dir);
  if (base.is_quantized())
    fail(code::kConfig, model_dir + " is quantised already: quantise the original model.", {{"path", model_dir}});
  QuantizationOptions options;
  options.method = QuantizationOptions::parse(args.at("quantization").get<std::string>());
  options.double_quantization = args.value("doubleQuantization", true);
  if (options.method == QuantizationOptions::Method::kFp8) {
    fail(code::kConfig,
         "No checkpoint holds fp8 weights: they are made as a model is loaded (base_dtype: fp8). Save it as nf4 or "
         "int8.",
         {{"field", "quantization"}});
  }
  const at::Device device = parse_device(args.at("device").get<std::string>());
  use_threads(device);
  const at::ScalarType dtype = parse_dtype(args.at("dtype").get<std::string>());

  // Built without weights, for its names.
  const auto model = create_model(family, config, model_dir);
  const std::set<std::string> chosen = quantizable_weights(*model, options.method);

  const auto is_chosen = [&](const std::string& name) { return chosen.count(family.canonical_key(name)) > 0; };
  const auto parts = [&](const std::string& name) {
    std::vector<std::pair<std::string, at::Tensor>> out;
    const QuantizedPtr weight = quantize(base.tensor(name).to(device, dtype), options);
    for (const auto& [suffix, tensor] : weight->stored()) out.emplace_back(quantized_part_name(name, suffix), tensor);
    return out;
  };
  // What int8 keeps of its outliers is known only when a matrix was looked at: twice is cheaper than keeping all.
  ShardPlan plan;
  int64_t bytes = 0;
  for (const std::string& name : base.names()) {
    job.check();
    if (!is_chosen(name)) {
      TensorInfo info = base.info(name);
      if (at::isFloatingType(info.dtype)) info.dtype = dtype;
      plan.push_back(std::move(info));
      continue;
    }
    for (const auto& [part, tensor] : parts(name)) plan.push_back({part, tensor.scalar_type(), tensor.sizes().vec()});
  }
  ShardWriter writer(args.at("outputDir").get<std::string>(), plan, args.at("maxShardSize").get<int64_t>());
  int64_t done = 0, quantized = 0;
  for (const std::string& name : base.names()) {
    job.check();
    if (is_chosen(name)) {
      for (const auto& [part, tensor] : parts(name)) {
        writer.add(part, tensor);
        bytes += static_cast<int64_t>(tensor.nbytes());
      }
      ++quantized;
    } else {
      const at::Tensor tensor = base.tensor(name);
      const at::Tensor value = at::isFloatingType(tensor.scalar_type()) ? tensor.to(dtype) : tensor;
      bytes += static_cast<int64_t>(value.nbytes());
      writer.add(name, value);
    }
    job.emit(json{{"type", "quantize"}, {"done", ++done}, {"total", base.names().size()}}.dump());
  }
  return {{"shards", writer.finish()}, {"quantizedTensors", quantized}, {"bytes", bytes}};
}

}  // namespace martlet
