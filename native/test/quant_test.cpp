// Quantised weights against what bitsandbytes computes (test/reference/make_engine.py).
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "check.h"
#include "core/io/safetensors.h"
#include "core/nn/linear.h"
#include "core/quant/blockwise.h"
#include "core/quant/int8.h"
#include "core/quant/nf4.h"

using namespace martlet;
using namespace martlet::test;

namespace {

std::shared_ptr<SafetensorsFile> fixture() {
  static const auto file = SafetensorsFile::open(fixtures() / "quant.safetensors");
  return file;
}

at::Tensor part(const QuantizedTensor& weight, const std::string& suffix) {
  for (const auto& [name, tensor] : weight.stored()) {
    if (name == suffix) return tensor;
  }
  return at::Tensor();
}

QuantizedPtr read_back(const QuantizedTensor& weight) {
  return read_quantized(
      "w", [&](const std::string& suffix) { return part(weight, suffix); }, weight.sizes(), weight.dtype(), at::kCPU);
}

}  // namespace

TEST("the 8-bit dynamic codes are bitsandbytes' tables, to the bit") {
  EXPECT_SAME(dynamic_map(true, at::kCPU), fixture()->tensor("map.signed"));
  EXPECT_SAME(dynamic_map(false, at::kCPU), fixture()->tensor("map.unsigned"));
}

TEST("blockwise codes: bitsandbytes', with a short last block") {
  const at::Tensor values = fixture()->tensor("blockwise.values"), map = dynamic_map(true, at::kCPU);
  const BlockwiseCodes own = quantize_blockwise(values, map, 256);
  EXPECT_SAME(own.codes, fixture()->tensor("blockwise.codes"));
  EXPECT_SAME(own.absmax, fixture()->tensor("blockwise.absmax"));
  EXPECT_SAME(dequantize_blockwise(own.codes, own.absmax, map, 256), fixture()->tensor("blockwise.back"));
}

TEST("NF4: codes, scales and values are bitsandbytes' to the bit, with and without double quantisation") {
  for (const std::string name : {"f32", "bf16", "f16", "odd"}) {
    const at::Tensor weight = fixture()->tensor("nf4." + name);
    for (const bool nested : {true, false}) {
      const std::string key = "nf4." + name + (nested ? ".nested" : ".plain");
      const QuantizedPtr own = Nf4Tensor::quantize(weight, nested);
      EXPECT_SAME(part(*own, ""), fixture()->tensor(key + ".codes"));
      EXPECT_SAME(part(*own, ".absmax"), fixture()->tensor(key + ".absmax"));
      if (nested) {
        EXPECT_SAME(part(*own, ".nested_absmax"), fixture()->tensor(key + ".nested_absmax"));
        EXPECT_SAME(part(*own, ".nested_quant_map"), fixture()->tensor(key + ".nested_quant_map"));
      }
      EXPECT_SAME(part(*own, ".quant_map"), fixture()->tensor(key + ".quant_map"));
      EXPECT_SAME(own->dequantize(), fixture()->tensor(key + ".back"));
      EXPECT_SAME(read_back(*own)->dequantize(), own->dequantize());
    }
  }
}

TEST("NF4: a state that bitsandbytes packed is read") {
  const auto find = [](const std::string& suffix) {
    const std::string key = "packed.weight" + suffix;
    return fixture()->find(key) == nullptr ? at::Tensor() : fixture()->tensor(key);
  };
  const QuantizedPtr weight = read_quantized("w", find, {48, 64}, at::kBFloat16, at::kCPU);
  EXPECT_SAME(weight->dequantize(), fixture()->tensor("packed.back"));
  EXPECT_THROWS_CODE(code::kWeights, read_quantized("w", find, {64, 48}, at::kBFloat16, at::kCPU));
  const auto without = [&](const std::string& suffix) { return suffix == ".absmax" ? at::Tensor() : find(suffix); };
  EXPECT_CONTAINS(
      EXPECT_THROWS_CODE(code::kWeights, read_quantized("w", without, {48, 64}, at::kBFloat16, at::kCPU)).what(),
      ".absmax");
}

TEST("NF4: each value is within half a code of the original; zeros stay zeros") {
  const at::Tensor weight = randn({32, 64}, 3);
  weight.select(0, 5).zero_();
  const at::Tensor back = Nf4Tensor::quantize(weight, false)->dequantize();
  // The widest gap between two codes is 0.304 of the block's largest magnitude.
  EXPECT((back - weight).abs().max().item<double>() <= 0.153 * weight.abs().max().item<double>());
  EXPECT_EQ(back.select(0, 5).abs().sum().item<double>(), 0.0);
}

TEST("int8: codes and scales of rows are bitsandbytes'; what is read back is the same") {
  const at::Tensor weight = fixture()->tensor("int8.weight");
  const QuantizedPtr own = Int8Tensor::quantize(weight);
  EXPECT_SAME(part(*own, ""), fixture()->tensor("int8.codes"));
  EXPECT_SAME(part(*own, ".SCB"), fixture()->tensor("int8.scale"));
  EXPECT_CLOSE(own->dequantize(), fixture()->tensor("int8.back"), 2e-3);
  EXPECT(!part(*own, ".outlier_columns").defined());
  EXPECT_SAME(read_back(*own)->dequantize(), own->dequantize());
}

TEST("int8: columns with outliers are kept and do not coarsen their rows") {
  at::Tensor weight = randn({96, 256}, 4) * 0.1;
  const at::Tensor plain_error = (Int8Tensor::quantize(weight)->dequantize() - weight).abs().max();
  weight.select(1, 17).mul_(50);
  weight.select(1, 200).mul_(30);
  const QuantizedPtr own = Int8Tensor::quantize(weight);
  const at::Tensor back = own->dequantize();
  EXPECT_SAME(part(*own, ".outlier_columns"), at::tensor({17, 200}, at::kLong));
  EXPECT_SAME(back.select(1, 17), weight.select(1, 17));
  EXPECT_SAME(back.select(1, 200), weight.select(1, 200));
  EXPECT((back - weight).abs().max().item<double>() <= 1.05 * plain_error.item<double>());
  EXPECT_SAME(read_back(*own)->dequantize(), back);
}

TEST("a linear on a quantised weight: forward and gradients are those of the dequantised one") {
  for (const auto method : {QuantizationOptions::Method::kNf4, QuantizationOptions::Method::kInt8}) {
    Linear own(64, 32, true), plain(64, 32, true);
    QuantizationOptions options;
    options.method = method;
    own.weight.quantized = quantize(randn({32, 64}, 1), options);
    plain.weight.value = own.weight.quantized->dequantize();
    own.bias.value = plain.bias.value = randn({32}, 2);
    const at::Tensor dy = randn({5, 32}, 3);
    LoraLayer lora;
    lora.a = randn({4, 64}, 4).requires_grad_(true);
    lora.b = randn({32, 4}, 5).requires_grad_(true);
    lora.scaling = 0.5;
    for (const LoraLayer* active : {static_cast<const LoraLayer*>(nullptr), static_cast<const LoraLayer*>(&lora)}) {
      own.lora = plain.lora = active;
      const at::Tensor x = randn({5, 64}, 6).requires_grad_(true);
      std::vector<at::Tensor> leaves = {x};
      if (active != nullptr) leaves.insert(leaves.end(), {lora.a, lora.b});
      const at::Tensor y = own.forward(x), expected = plain.forward(x);
      EXPECT_SAME(y.detach(), expected.detach());
      const auto grads = torch::autograd::grad({y}, leaves, {dy});
      const auto wanted = torch::autograd::grad({expected}, leaves, {dy});
      for (size_t i = 0; i < leaves.size(); ++i) EXPECT_CLOSE(grads[i], wanted[i], 1e-5);
    }
  }
}
