#include "core/lora/merge.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/runtime.h"
#include "core/io/checkpoint.h"
#include "core/io/mapped_file.h"
#include "core/io/safetensors.h"
#include "core/io/transfer.h"
#include "core/lora/adapter_io.h"
#include "core/models/quantization.h"
#include "core/models/registry.h"

namespace martlet {
namespace {

using nlohmann::json;

// Rows at a time. On the CPU 512 K elements, 4 MB in float64: temporaries of that size stay in the cache, and in the
// heap; larger ones are fresh pages from the system each time.
int64_t rows_per_block(int64_t columns, at::Device device) {
  return std::max<int64_t>(1, (int64_t{1} << (device.is_cpu() ? 19 : 24)) / columns);
}

// Rows of a matrix; of a mapped file without its pages.
at::Tensor rows_of(const at::Tensor& weight, int64_t start, int64_t count) {
  const at::Tensor rows = weight.narrow(0, start, count);
  const MappedFile* file = weight.is_cpu() && weight.is_contiguous() ? MappedFile::of(weight) : nullptr;
  if (file == nullptr) return rows;
  const at::Tensor copy = at::empty(rows.sizes(), rows.options());
  file->read(copy.mutable_data_ptr(), file->offset_of(rows), copy.nbytes());
  return copy;
}

// One adapter's pair where the merging is done.
class Merger {
 public:
  Merger(const LoraWeights& pair, double scaling, at::Device device) : scaling_(scaling) {
    a_ = pair.a.to(device, at::kFloat);
    b_ = pair.b.to(device, at::kFloat);
    a64_ = pair.a.to(device, at::kDouble);
    b64_ = pair.b.to(device, at::kDouble);
    if (pair.magnitude.defined()) magnitude_ = pair.magnitude.to(device);
  }

  // Fills `out` with the merged rows from `start` on; gives the largest distance from the float64 sum.
  at::Tensor merge(const at::Tensor& rows, int64_t start, const at::Tensor& out) const {
    const int64_t n = rows.size(0);
    const at::Tensor sum = at::addmm(rows.to(at::kFloat), b_.narrow(0, start, n), a_, 1.0, scaling_);
    out.copy_(at_length(sum, start));
    const at::Tensor exact = at::addmm(rows.to(at::kDouble), b64_.narrow(0, start, n), a64_, 1.0, scaling_);
    return (out.to(at::kDouble) - at_length(exact, start)).abs().max();
  }

 private:
  // DoRA: each row is given the length that its magnitude says.
  at::Tensor at_length(const at::Tensor& sum, int64_t start) const {
    if (!magnitude_.defined()) return sum;
    const at::Tensor length = magnitude_.narrow(0, start, sum.size(0)).to(sum.scalar_type());
    return sum * (length / at::linalg_vector_norm(sum, 2, at::IntArrayRef{1})).unsqueeze(1);
  }

  double scaling_;
  at::Tensor a_, b_, a64_, b64_, magnitude_;
};

// `max_error` [] float64 on the device is raised to what this tensor adds.
at::Tensor merged(const at::Tensor& weight, const Merger& merger, at::ScalarType dtype, at::Tensor& max_error) {
  const at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(dtype));
  const int64_t rows = weight.size(0), block = rows_per_block(weight.size(1), weight.device());
  const int64_t blocks = (rows + block - 1) / block;
  std::vector<at::Tensor> errors(static_cast<size_t>(blocks));
  const auto merge_block = [&](int64_t i) {
    const int64_t start = i * block, n = std::min(block, rows - start);
    errors[static_cast<size_t>(i)] = merger.merge(rows_of(weight, start, n), start, out.narrow(0, start, n));
  };
  if (weight.is_cpu()) {
    // Blocks side by side: each is too small for all threads.
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const at::NoGradGuard no_grad;
      for (int64_t i = begin; i < end; ++i) merge_block(i);
    });
  } else {
    for (int64_t i = 0; i < blocks; ++i) merge_block(i);
  }
  errors.push_back(max_error);
  max_error = at::stack(errors).max();
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
    const auto model = create_model(family, config, model_dir.string());
    requantized = quantizable_weights(*model, quantization.method);
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
  const at::Device device = parse_device(args.value("device", "cpu"));
  use_threads(device);
  WeightReader reader;
  const auto on_device = [&](const at::Tensor& value) {
    if (device.is_cpu()) return value;
    const at::Tensor copy = at::empty(value.sizes(), value.options().device(device));
    reader.read(value, copy);
    reader.wait();
    return copy;
  };
  at::Tensor max_error = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(device));
  int64_t merged_tensors = 0, done = 0;
  for (const TensorInfo& info : plan) {
    job.check();
    const std::string key = family.canonical_key(info.name);
    at::Tensor value = base.tensor(info.name);
    if (requantized.count(key)) value = quantize(value.to(compute_dtype), quantization)->dequantize();
    const std::string module = key.size() > 7 ? key.substr(0, key.size() - 7) : key;
    if (const auto it = adapter.pairs.find(module); it != adapter.pairs.end() && key == module + ".weight") {
      const Merger merger(it->second, adapter.config.scaling(module), device);
      value = merged(on_device(value), merger, info.dtype, max_error);
      ++merged_tensors;
    } else if (const auto saved = adapter.saved_modules.find(key); saved != adapter.saved_modules.end()) {
      value = saved->second.reshape(info.shape).to(info.dtype);
      ++merged_tensors;
    }
    writer.add(info.name, value.to(info.dtype));
    job.emit(json{{"type", "merge"}, {"done", ++done}, {"total", plan.size()}}.dump());
  }
  return {{"shards", writer.finish()}, {"mergedTensors", merged_tensors}, {"maxAbsError", max_error.item<double>()}};
}

}  // namespace martlet
