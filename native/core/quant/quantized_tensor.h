// Weights kept in 4 or 8 bits: NF4 with double quantisation (Dettmers et al. 2023, QLoRA) and int8 by rows (Dettmers et
// al. 2022, LLM.int8), computed with in 16 and with bitsandbytes' codes and scales, bit for bit; and fp8, which the
// products of are of 8 bits themselves. ATen operations only, so that all run where the tensors are.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace martlet {
namespace cuda {
struct Matrix;
}

struct QuantizationOptions {
  enum class Method { kNone, kInt8, kNf4, kFp8 };
  Method method = Method::kNone;
  bool double_quantization = true;  // nf4: scales in 8 bits too

  bool enabled() const { return method != Method::kNone; }
  // none | int8 | nf4 | fp8; anything else is ERR_MARTLET_CONFIG.
  static Method parse(const std::string& name);
};

// A matrix [out, in].
class QuantizedTensor {
 public:
  virtual ~QuantizedTensor() = default;

  // The whole matrix in the dtype that it was quantised from (the one that is computed in).
  at::Tensor dequantize() const;
  // The same into `out`, of that shape and dtype; its rows may lie further apart than they are long.
  virtual void dequantize_to(const at::Tensor& out) const = 0;
  // x Wᵀ + bias (may be undefined) and dy W, of rows [T, …] in dtype(). No autograd.
  virtual at::Tensor linear(const at::Tensor& x, const at::Tensor& bias) const;
  virtual at::Tensor input_gradient(const at::Tensor& dy) const;
  // The tensors of a checkpoint by what follows the weight's name ("" = the weight itself), as bitsandbytes saves them.
  virtual std::vector<std::pair<std::string, at::Tensor>> stored() const = 0;
  // Codes and scales for the kernels that multiply by them a few rows at a time, CUDA's and the CPU's. They belong to
  // this tensor. False: those know nothing of this form.
  virtual bool describe(cuda::Matrix& out) const = 0;

  at::IntArrayRef sizes() const { return shape_; }
  at::ScalarType dtype() const { return dtype_; }
  virtual at::Device device() const = 0;
  int64_t nbytes() const;

 protected:
  QuantizedTensor(at::IntArrayRef shape, at::ScalarType dtype) : shape_(shape.vec()), dtype_(dtype) {}
  std::vector<int64_t> shape_;
  at::ScalarType dtype_;
};
using QuantizedPtr = std::shared_ptr<const QuantizedTensor>;

// `weight` is in the dtype to compute in, on the device to compute on.
QuantizedPtr quantize(const at::Tensor& weight, const QuantizationOptions& options);

// The name that a checkpoint stores a part of a quantised weight under: `….weight.absmax`, but `….SCB` (bitsandbytes
// keeps the parts of an int8 weight in its module).
std::string quantized_part_name(const std::string& weight_name, const std::string& suffix);

// A weight that a checkpoint holds quantised. `find` gives the stored part with that suffix ("" = the weight itself),
// or an undefined tensor. Null: it is not quantised. A form that is not known is ERR_MARTLET_WEIGHTS.
QuantizedPtr read_quantized(const std::string& name, const std::function<at::Tensor(const std::string& suffix)>& find,
                            at::IntArrayRef shape, at::ScalarType dtype, at::Device device);

// The weight that `key` is a part of in a quantised checkpoint (`….weight` of `….weight.absmax`); empty when it is
// none.
std::string quantized_owner(const std::string& key);

}  // namespace martlet
