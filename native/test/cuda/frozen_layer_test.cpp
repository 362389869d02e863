// The decoder's layer written out, with its kernels, beside the layer under autograd on the GPU and in float32 on the
// CPU.
#include <ATen/ATen.h>

#include "check.h"
#include "core/base/cuda_kernels.h"
#include "cuda/gpu.h"
#include "layer_case.h"

using namespace martlet;
using namespace martlet::test;

namespace {

void compare(const std::string& what, LayerOptions options) {
  if (options.form == PairForm::kInPlace && options.pair_dtype == options.dtype) {
    LayerOptions augmented = options;
    augmented.form = PairForm::kAugmented;
    compare(what + ", augmented", augmented);
  }
  const LayerResult exact = LayerCase(options, at::kFloat).run(/*written_out=*/false, Recompute::kNone);
  options.device = gpu();
  LayerCase c(options);
  EXPECT(cuda_kernels(c.x) != nullptr);
  const LayerResult reference = c.run(/*written_out=*/false, Recompute::kNone);
  double worst_error = 0, worst_reference = 0, least_cosine = 1;
  for (const Recompute recompute : {Recompute::kNone, Recompute::kMlp, Recompute::kLayer}) {
    const LayerResult actual = c.run(/*written_out=*/true, recompute);
    EXPECT(c.took_written_out);
    for (const auto& [name, tensor] : exact) {
      const double own = relative_error(actual.at(name), tensor),
                   of_reference = relative_error(reference.at(name), tensor);
      const double near = cosine(actual.at(name), reference.at(name));
      worst_error = std::max(worst_error, own);
      worst_reference = std::max(worst_reference, of_reference);
      least_cosine = std::min(least_cosine, near);
      // Two roundings of the same numbers, each about as far from them.
      const double least = 1 - 2 * std::max(of_reference * of_reference, 1e-6);
      if (!(own <= 1.2 * of_reference + 1e-3 && near > least)) {
        record_failure(__FILE__, __LINE__,
                       what + ", recompute " + std::to_string(static_cast<int>(recompute)) + ", " + name + ": " +
                           std::to_string(own) + " from float32 (autograd " + std::to_string(of_reference) +
                           "), cosine to autograd's " + std::to_string(near));
      }
    }
  }
  std::printf("  %s: from float32 %.5f (autograd %.5f), least cosine %.7f\n", what.c_str(), worst_error,
              worst_reference, least_cosine);
}

LayerOptions in_16_bits(at::ScalarType dtype) {
  LayerOptions options;
  options.config.hidden_size = 256;
  options.config.intermediate_size = 704;
  options.config.head_dim = 64;
  options.config.rope_axis.clear();
  for (int64_t i = 0; i < 32; ++i) options.config.rope_axis.push_back(i % 3);
  options.lengths = {200, 200};
  options.dtype = options.pair_dtype = dtype;
  return options;
}

}  // namespace

TEST("value and gradients in 16 bits") {
  gpu();  // before autograd's threads, one for each device, are started
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    LayerOptions options = in_16_bits(dtype);
    compare("plain", options);
    options.pair_dtype = at::kFloat;
    compare("pairs in float32", options);
    options.pair_dtype = dtype;
    options.config.num_kv_heads = 2;
    options.config.qkv_bias = true;
    options.lengths = {150, 1, 77, 300};
    compare("grouped heads, biases, packed rows", options);
    options.config.qk_norm = true;
    options.axes = true;
    compare("norms of q and k, three axes", options);
    options.config.rope_float32 = true;
    options.targets = {"q_proj", "v_proj", "down_proj"};
    compare("three targets, rotation in float32", options);
    LayerOptions fused = in_16_bits(dtype);
    fused.config.fused_qkv = true;
    fused.config.qkv_bias = true;
    compare("fused q, k, v", fused);
  }
}
