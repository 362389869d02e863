#include "core/lora/merge.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"
#include "core/lora/adapter_io.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"

namespace martlet {
namespace {

using nlohmann::json;

// Rows at a time: 512 K elements, 4 MB in float64. Temporaries of that size stay in the cache, and in the heap; larger
// ones are fresh pages from the system each time.
int64_t rows_per_block(int64_t columns) { return std::max<int64_t>(1, (int64_t{512} << 10) / columns); }

// DoRA: each row is then given the length that its magnitude says.
at::Tensor merged(const at::Tensor& weight, const LoraWeights& pair, double scaling, at::ScalarType dtype,
                  double& max_error) {
  at::Tensor out = at::empty(weight.sizes(), dtype);
  const int64_t rows = weight.size(0), block = rows_per_block(weight.size(1));
  const at::Tensor a64 = pair.a.to(at::kDouble), b64 = pair.b.to(at::kDouble), a32 = pair.a.to(at::kFloat),
                   b32 = pair.b.to(at::kFloat);
  const auto at_length = [&](const at::Tensor& sum, int64_t start) {
    if (!pair.magnitude.defined()) return sum;
    const at::Tensor length = pair.magnitude.narrow(0, start, sum.size(0)).to(sum.scalar_type());
    return sum * (length / at::linalg_vector_norm(sum, 2, at::IntArrayRef{1})).unsqueeze(1);
  };
  for (int64_t start = 0; start < rows; start += block) {
    const int64_t n = std::min(block, rows - start);
    const at::Tensor w = weight.narrow(0, start, n);
    const at::Tensor sum =
        at_length(at::addmm(w.to(at::kFloat), b32.narrow(0, start, n), a32, 1.0, scaling), start).to(dtype);
    const at::Tensor exact = at_length(at::addmm(w.to(at::kDouble), b64.narrow(0, start, n), a64, 1.0, scaling), start);
    max_error = std::max(max_error, (sum.to(at::kDouble) - exact).abs().max().item<double>());
    out.narrow(0, start, n).copy_(sum);
  }
  return out;
}

}  // namespace

json merge_adapter_json(const json& args, JobContext& job) {
  const at::NoGradGuard no_grad;
  const std::filesystem::path model_dir = args.at("modelDir").get<std::string>(),
                              adapter_dir = args.at("adapterDir").get<std::string>();
  const json config = read_json_file(model_dir / "config.json");
  const Family& family = family_for(config, model_dir.string());
  const DenseCheckpoint base(model_dir.string());
  const AdapterWeights adapter = read_adapter(adapter_dir, family.canonical_key);
  std::optional<at::ScalarType> dtype;
  if (args.contains("dtype")) dtype = parse_dtype(args["dtype"].get<std::string>());

  // base: 'quantized' — the weights that the adapter was trained against: quantised as then, and back.
  std::set<std::string> requantized;
  QuantizationOptions quantization;
  at::ScalarType compute_dtype = at::kFloat;
  if (args.contains("quantization") && !base.is_quantized()) {
    const json& q = args["quantization"];
    quantization.method = QuantizationOptions::parse(q.at("method").get<std::string>());
    quantization.double_quantization = q.at("doubleQuantization").get<bool>();
    const std::string wanted = q.at("dtype").get<std::string>();
    // Built without weights, for its names.
    const auto model = family.create(config, [](const std::string&) { return at::Tensor(); });
    requantized = quantizable_weights(*model);
    if (wanted == "auto") {
      std::vector<std::pair<std::string, TensorInfo>> tensors;
      for (const std::string& name : base.names()) tensors.emplace_back(family.canonical_key(name), base.info(name));
      compute_dtype = stored_dtype(*model, tensors);
    } else {
      compute_dtype = parse_dtype(wanted);
    }
  }

  std::set<std::string> open_modules, open_saved;
  for (const auto& [module, pair] : adapter.pairs) open_modules.insert(module);
  for (const auto& [key, tensor] : adapter.saved_modules) open_saved.insert(key);

  ShardPlan plan;
  for (const std::string& name : base.names()) {
    TensorInfo info = base.info(name);
    if (dtype && at::isFloatingType(info.dtype)) info.dtype = *dtype;
    plan.push_back(std::move(info));
  }
  // All modules are matched before the first byte is written.
  for (const TensorInfo& info : plan) {
    const std::string key = family.canonical_key(info.name);
    open_saved.erase(key);
    if (key.size() < 7 || key.compare(key.size() - 7, 7, ".weight") != 0) continue;
    const std::string module = key.substr(0, key.size() - 7);
    const auto it = adapter.pairs.find(module);
    if (it == adapter.pairs.end()) continue;
    if (info.shape.size() != 2 || it->second.b.size(0) != info.shape[0] || it->second.a.size(1) != info.shape[1]) {
      fail(code::kAdapter,
           "The adapter in " + adapter_dir.string() + " is for another model: the shape of " + module + " differs.",
           {{"path", adapter_dir.string()}, {"module", module}});
    }
    open_modules.erase(module);
  }
  open_modules.insert(open_saved.begin(), open_saved.end());
  if (!open_modules.empty()) {
    fail(code::kAdapter,
         "The adapter in " + adapter_dir.string() + " is for another model: " + model_dir.string() + " has no " +
             *open_modules.begin() +
             (open_modules.size() > 1 ? " and " + std::to_string(open_modules.size() - 1) + " more" : "") + ".",
         {{"path", adapter_dir.string()},
          {"unexpected", std::vector<std::string>(open_modules.begin(), open_modules.end())}});
  }

  ShardWriter writer(args.at("outputDir").get<std::string>(), plan, args.at("maxShardSize").get<int64_t>());
  double max_error = 0;
  int64_t merged_tensors = 0, done = 0;
  for (const TensorInfo& info : plan) {
    job.check();
    const std::string key = family.canonical_key(info.name);
    at::Tensor value = base.tensor(info.name);
    if (requantized.count(key)) value = quantize(value.to(compute_dtype), quantization)->dequantize();
    const std::string module = key.size() > 7 ? key.substr(0, key.size() - 7) : key;
    if (const auto it = adapter.pairs.find(module); it != adapter.pairs.end() && key == module + ".weight") {
      value = merged(value, it->second, adapter.config.scaling(module), info.dtype, max_error);
      ++merged_tensors;
    } else if (const auto saved = adapter.saved_modules.find(key); saved != adapter.saved_modules.end()) {
      value = saved->second.reshape(info.shape).to(info.dtype);
      ++merged_tensors;
    }
    writer.add(info.name, value.to(info.dtype));
    job.emit(json{{"type", "merge"}, {"done", ++done}, {"total", plan.size()}}.dump());
  }
  return {{"shards", writer.finish()}, {"mergedTensors", merged_tensors}, {"maxAbsError", max_error}};
}

}  // namespace martlet
