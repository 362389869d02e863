#include "core/quant/quantized_tensor.h"

#include <ATen/ATen.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/quant/fp8.h"
#include "core/quant/int8.h"
#include "core/quant/nf4.h"

namespace martlet {

QuantizationOptions::Method QuantizationOptions::parse(const std::string& name) {
  if (name == "none") return Method::kNone;
  if (name == "int8") return Method::kInt8;
  if (name == "nf4") return Method::kNf4;
  if (name == "fp8") return Method::kFp8;
  fail(code::kConfig, "quantization \"" + name + "\" is not known; use none, int8, nf4 or fp8.");
}

at::Tensor QuantizedTensor::dequantize() const {
  const at::Tensor out = at::empty(shape_, at::TensorOptions().dtype(dtype_).device(device()));
  dequantize_to(out);
  return out;
}

at::Tensor QuantizedTensor::linear(const at::Tensor& x, const at::Tensor& bias) const {
  return at::linear(x, dequantize(), bias.defined() ? std::optional(bias) : std::nullopt);
}

at::Tensor QuantizedTensor::input_gradient(const at::Tensor& dy) const { return at::mm(dy, dequantize()); }

int64_t QuantizedTensor::nbytes() const {
  int64_t bytes = 0;
  for (const auto& [suffix, tensor] : stored()) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

QuantizedPtr quantize(const at::Tensor& weight, const QuantizationOptions& options) {
  if (options.method == QuantizationOptions::Method::kInt8) return Int8Tensor::quantize(weight);
  if (options.method == QuantizationOptions::Method::kFp8) return Fp8Tensor::quantize(weight);
  return Nf4Tensor::quantize(weight, options.double_quantization);
}

QuantizedPtr read_quantized(const std::string& name, const std::function<at::Tensor(const std::string&)>& find,
                            at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  if (find(".quant_state.bitsandbytes__fp4").defined()) {
    fail(code::kWeights,
         "The checkpoint holds " + name +
             " as FP4, which is not supported; NF4 and int8 are. Take the model in 16 bits.",
         {{"key", name}});
  }
  if (find(Nf4Tensor::kStateSuffix).defined()) return Nf4Tensor::read(name, find, shape, dtype, device);
  if (find(".SCB").defined()) return Int8Tensor::read(name, find, shape, dtype, device);
  return nullptr;
}

namespace {

constexpr const char* kWeight = ".weight";
constexpr const char* kBesideWeight[] = {".absmax",
                                         ".quant_map",
                                         ".nested_absmax",
                                         ".nested_quant_map",
                                         ".quant_state.bitsandbytes__nf4",
                                         ".quant_state.bitsandbytes__fp4"};
constexpr const char* kInModule[] = {".SCB", ".weight_format", ".outlier_columns", ".outlier_values"};

bool ends_with(const std::string& text, const std::string& tail) {
  return text.size() > tail.size() && text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

}  // namespace

std::string quantized_part_name(const std::string& weight_name, const std::string& suffix) {
  for (const char* part : kInModule) {
    if (suffix == part && ends_with(weight_name, kWeight))
      return weight_name.substr(0, weight_name.size() - std::strlen(kWeight)) + suffix;
  }
  return weight_name + suffix;
}

std::string quantized_owner(const std::string& key) {
  for (const char* suffix : kBesideWeight) {
    if (ends_with(key, suffix)) return key.substr(0, key.size() - std::strlen(suffix));
  }
  for (const char* suffix : kInModule) {
    if (ends_with(key, suffix)) return key.substr(0, key.size() - std::strlen(suffix)) + kWeight;
  }
  return "";
}

}  // namespace martlet
