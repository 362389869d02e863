// A tree of named parameters with one generic load and one generic verify, so that no model writes a loader of its own.
// Names are Hugging Face's. Modules are built without memory: parameters get their storage when load() finds them.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/quant/quantized_tensor.h"

namespace martlet {

struct Parameter {
  std::string name;  // within its module
  std::vector<int64_t> shape;
  at::Tensor value;        // undefined until loaded, and where `quantized` stands for it
  QuantizedPtr quantized;  // null = kept in full
  // The model's own value while an adapter's fully trained one stands in its place.
  std::optional<at::Tensor> replaced;
  bool fixed = false;  // a table of the checkpoint that is never trained

  int64_t numel() const;
  bool loaded() const { return value.defined() || quantized != nullptr; }
  at::ScalarType dtype() const { return value.defined() ? value.scalar_type() : quantized->dtype(); }
  at::Device device() const;
  // The value, dequantised if need be.
  at::Tensor dense() const { return value.defined() ? value : quantized->dequantize(); }
};

// Gives the tensor stored under a canonical name, or an undefined tensor.
using WeightSource = std::function<at::Tensor(const std::string& name)>;

struct LoadOptions {
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  // What lies beside a weight that is stored quantised, by quantized_part_name().
  WeightSource quantized_parts = [](const std::string&) { return at::Tensor(); };
  // Full names of the parameters that are quantised as they are loaded.
  std::function<bool(const std::string& name)> is_quantized = [](const std::string&) { return false; };
  QuantizationOptions quantization;
  // Full names of those that stay float32 where `dtype` is float16.
  std::function<bool(const std::string& name)> keeps_float32 = [](const std::string&) { return false; };
  // Fills `target` from a stored tensor of as many elements. Unless `now`, that may still be under way after load().
  std::function<void(const at::Tensor& stored, const at::Tensor& target, bool now)> copy =
      [](const at::Tensor& stored, const at::Tensor& target, bool) { target.copy_(stored.reshape(target.sizes())); };
  // Called after each parameter with its full name and what it takes in memory.
  std::function<void(const std::string& name, int64_t bytes)> on_parameter = [](const std::string&, int64_t) {};
};

class Module {
 public:
  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  virtual ~Module() = default;

  // Fills every parameter of the tree that `source` knows; a shape that differs is ERR_MARTLET_WEIGHTS naming key,
  // expected and found.
  void load(const WeightSource& source, const LoadOptions& options, const std::string& prefix = "");
  // Throws ERR_MARTLET_WEIGHTS with all names that load() did not fill.
  void verify(const std::string& prefix = "") const;

  // Depth first, in order of registration. `path` is the module's full name ("" for the root).
  void visit(const std::function<void(const std::string& path, Module&)>& fn, const std::string& path = "");
  void visit(const std::function<void(const std::string& path, const Module&)>& fn, const std::string& path = "") const;
  void visit_parameters(const std::function<void(const std::string& name, Parameter&)>& fn);

  std::vector<Parameter*> own_parameters() { return parameters_; }
  bool has_children() const { return !children_.empty(); }

 protected:
  // Members register themselves; the module does not own them through this list.
  void register_parameter(Parameter& parameter, std::string name, std::vector<int64_t> shape);
  void register_module(Module& child, std::string name);

 private:
  void collect_missing(const std::string& prefix, std::vector<std::string>& missing) const;

  std::vector<Parameter*> parameters_;
  std::vector<std::pair<std::string, Module*>> children_;
};

// Sees the output of every linear, norm and embedding that runs on this thread while it lives.
class OutputObserver {
 public:
  explicit OutputObserver(std::function<void(const Module&, const at::Tensor&)> fn);
  ~OutputObserver();
  OutputObserver(const OutputObserver&) = delete;
  OutputObserver& operator=(const OutputObserver&) = delete;

 private:
  std::function<void(const Module&, const at::Tensor&)> fn_, *before_;
};
// For the modules: tells the observer, if there is one.
void observe_output(const Module& module, const at::Tensor& output);
bool outputs_observed();

inline std::string join_path(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

}  // namespace martlet
