#include "core/nn/module.h"

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "core/base/error.h"

namespace martlet {

int64_t Parameter::numel() const {
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  return n;
}

at::Device Parameter::device() const { return value.defined() ? value.device() : quantized->device(); }

void Module::register_parameter(Parameter& parameter, std::string name, std::vector<int64_t> shape) {
  parameter.name = std::move(name);
  parameter.shape = std::move(shape);
  parameters_.push_back(&parameter);
}

void Module::register_module(Module& child, std::string name) { children_.emplace_back(std::move(name), &child); }

namespace {

// Some files hold tables with a leading batch of one.
at::IntArrayRef without_leading_ones(at::IntArrayRef shape) {
  while (shape.size() > 1 && shape[0] == 1) shape = shape.slice(1);
  return shape;
}

}  // namespace

void Module::load(const WeightSource& source, const LoadOptions& options, const std::string& prefix) {
  for (Parameter* parameter : parameters_) {
    const std::string name = join_path(prefix, parameter->name);
    parameter->quantized = read_quantized(
        name,
        [&](const std::string& suffix) {
          return suffix.empty() ? source(name) : options.quantized_parts(quantized_part_name(name, suffix));
        },
        parameter->shape, options.dtype, options.device);
    if (parameter->quantized) {
      options.on_parameter(name, parameter->quantized->nbytes());
      continue;
    }
    const at::Tensor stored = source(name);
    if (!stored.defined()) continue;
    // A patch convolution is kept as the matrix it is (Linear over flat patches), so equal element counts with the same
    // leading size do.
    const bool same = without_leading_ones(stored.sizes()) == without_leading_ones(parameter->shape);
    const bool flattened = stored.dim() > 2 && parameter->shape.size() == 2 && stored.size(0) == parameter->shape[0] &&
                           stored.numel() == parameter->shape[0] * parameter->shape[1];
    if (!same && !flattened) {
      fail(code::kWeights,
           "The tensor " + name + " has shape " + nlohmann::json(stored.sizes().vec()).dump() +
               ", but config.json asks for " + nlohmann::json(parameter->shape).dump() +
               ". The weights and config.json are not of one model: download the checkpoint again.",
           {{"key", name}, {"expected", parameter->shape}, {"found", stored.sizes().vec()}});
    }
    const bool wide = options.dtype == at::kHalf && options.keeps_float32(name);
    const auto wanted = at::TensorOptions().dtype(wide ? at::kFloat : options.dtype).device(options.device);
    const bool quantizes = options.quantization.enabled() && options.is_quantized(name);
    // On the CPU a weight is quantised from where it lies in the file.
    const bool in_place = quantizes && options.device.is_cpu();
    const at::Tensor value =
        in_place ? stored.reshape(parameter->shape).to(wanted) : at::empty(parameter->shape, wanted);
    if (!in_place) options.copy(stored, value, /*now=*/quantizes);
    if (quantizes) {
      parameter->quantized = quantize(value, options.quantization);
      options.on_parameter(name, parameter->quantized->nbytes());
      continue;
    }
    parameter->value = value;
    options.on_parameter(name, static_cast<int64_t>(parameter->value.nbytes()));
  }
  for (auto& [name, child] : children_) child->load(source, options, join_path(prefix, name));
}

void Module::collect_missing(const std::string& prefix, std::vector<std::string>& missing) const {
  for (const Parameter* parameter : parameters_) {
    if (!parameter->loaded()) missing.push_back(join_path(prefix, parameter->name));
  }
  for (const auto& [name, child] : children_) child->collect_missing(join_path(prefix, name), missing);
}

void Module::verify(const std::string& prefix) const {
  std::vector<std::string> missing;
  collect_missing(prefix, missing);
  if (missing.empty()) return;
  std::string list;
  for (size_t i = 0; i < missing.size() && i < 5; ++i) list += (i ? ", " : "") + missing[i];
  if (missing.size() > 5) list += ", …";
  fail(code::kWeights,
       "The checkpoint lacks " + std::to_string(missing.size()) + " tensor(s) that the model needs: " + list +
           ". Download the missing shards, or check that config.json belongs to these weights.",
       {{"missing", missing}});
}

void Module::visit(const std::function<void(const std::string&, Module&)>& fn, const std::string& path) {
  fn(path, *this);
  for (auto& [name, child] : children_) child->visit(fn, join_path(path, name));
}

void Module::visit(const std::function<void(const std::string&, const Module&)>& fn, const std::string& path) const {
  fn(path, *this);
  for (const auto& [name, child] : children_) static_cast<const Module*>(child)->visit(fn, join_path(path, name));
}

void Module::visit_parameters(const std::function<void(const std::string&, Parameter&)>& fn) {
  visit([&](const std::string& path, Module& module) {
    for (Parameter* parameter : module.parameters_) fn(join_path(path, parameter->name), *parameter);
  });
}

namespace {
thread_local std::function<void(const Module&, const at::Tensor&)>* observer = nullptr;
}  // namespace

OutputObserver::OutputObserver(std::function<void(const Module&, const at::Tensor&)> fn)
    : fn_(std::move(fn)), before_(observer) {
  observer = &fn_;
}
OutputObserver::~OutputObserver() { observer = before_; }

bool outputs_observed() { return observer != nullptr; }

void observe_output(const Module& module, const at::Tensor& output) {
  if (observer != nullptr) (*observer)(module, output);
}

}  // namespace martlet
