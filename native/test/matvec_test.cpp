// Products of few rows on the CPU, at each level that this machine has, against ATen's on the dequantised weight.
#include "core/nn/matvec.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "check.h"
#include "core/nn/linear.h"
#include "core/quant/int8.h"
#include "core/quant/nf4.h"
#include "random_decoder.h"

using namespace martlet;
using namespace martlet::test;

namespace {

std::vector<Isa> levels() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (is_supported(isa)) found.push_back(isa);
  }
  return found;
}

// In float64, of the numbers as they are kept.
at::Tensor reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  at::Tensor y = at::mm(x.to(at::kDouble), weight.to(at::kDouble).t());
  return bias.defined() ? y + bias.to(at::kDouble) : y;
}

// Of the largest result: half a unit in the last place of the result, and what the weights lose in it.
double tolerance(at::ScalarType dtype) { return dtype == at::kFloat ? 2e-6 : dtype == at::kHalf ? 1e-3 : 8e-3; }

constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};
// Whole vectors and blocks; a rest of each; rows that begin in the middle of a byte; more than one piece.
const std::vector<std::pair<int64_t, int64_t>> kShapes = {{48, 256}, {7, 64}, {33, 96}, {5, 71}, {3, 1}, {9, 2190}};

using Method = QuantizationOptions::Method;

}  // namespace

TEST("every level's product of a dense weight is ATen's, whatever the size") {
  for (const Isa isa : levels()) {
    for (const at::ScalarType dtype : kDtypes) {
      for (const auto& [out, in] : kShapes) {
        const at::Tensor w = randn({out, in}, 1, dtype), b = randn({out}, 2, dtype);
        for (const int64_t rows : {1, 3, 8}) {
          const at::Tensor x = randn({rows, in}, 3, dtype);
          for (const at::Tensor& bias : {b, at::Tensor()}) {
            const at::Tensor y = matvec(x, w, bias, isa), expected = reference(x, w, bias);
            EXPECT(y.scalar_type() == dtype);
            EXPECT_CLOSE(y, expected, tolerance(dtype) * expected.abs().max().item<double>());
          }
        }
      }
    }
  }
}

TEST("every level's product of int8 and NF4 is that of the dequantised weight, outlier columns and nested scales too") {
  for (const Isa isa : levels()) {
    for (const at::ScalarType dtype : kDtypes) {
      for (const auto& [out, in] : kShapes) {
        at::Tensor w = randn({out, in}, 4);
        // Columns that int8 keeps in full.
        if (in >= 128) w.index_fill_(1, at::tensor({int64_t{5}, in - 1}), 40.0);
        for (const QuantizationOptions& options :
             std::vector<QuantizationOptions>{{Method::kInt8, false}, {Method::kNf4, false}, {Method::kNf4, true}}) {
          const QuantizedPtr quantized = quantize(w.to(dtype), options);
          // What the codes say, before it is rounded to `dtype`.
          const at::Tensor exact = quantize(w.to(dtype).to(at::kFloat), options)->dequantize();
          if (options.method == Method::kInt8 && in >= 128)
            EXPECT(static_cast<const Int8Tensor&>(*quantized).outlier_columns().defined());
          const at::Tensor b = randn({out}, 5, dtype);
          for (const int64_t rows : {1, 8}) {
            const at::Tensor x = randn({rows, in}, 6, dtype), y = matvec(x, *quantized, b, isa),
                             expected = reference(x, exact, b);
            EXPECT(y.scalar_type() == dtype);
            EXPECT_CLOSE(y, expected, tolerance(dtype) * expected.abs().max().item<double>());
          }
        }
      }
    }
  }
}

TEST("a product is the kernels' only for few rows on the CPU that nothing is recorded of") {
  const at::Tensor w = randn({32, 128}, 7, at::kBFloat16), x = randn({1, 128}, 8, at::kBFloat16);
  const QuantizedPtr nf4 = Nf4Tensor::quantize(w, true);
  EXPECT_SAME(product(x, w, {}), best_isa() == Isa::kPlain ? at::linear(x, w) : matvec(x, w, {}));
  EXPECT_SAME(product(x, *nf4, {}), matvec(x, *nf4, {}));
  const at::Tensor many = randn({kMatvecRows + 1, 128}, 9, at::kBFloat16);
  EXPECT_SAME(product(many, w, {}), at::linear(many, w));
  EXPECT_SAME(product(many, *nf4, {}), at::linear(many, nf4->dequantize()));
  const at::Tensor none = many.narrow(0, 0, 0);
  EXPECT_SAME(product(none, *nf4, {}), at::linear(none, nf4->dequantize()));
  const at::Tensor recorded = w.clone().requires_grad_(true);
  product(x, recorded, {}).sum().backward();
  EXPECT_CLOSE(recorded.grad(), x.expand({32, 128}), 0);
  const at::Tensor input = x.clone().requires_grad_(true);
  EXPECT(product(input, *nf4, {}).requires_grad());
}

TEST("a row of a transposed input and a weight that is a view of another") {
  const at::Tensor x = randn({128, 2}, 10, at::kBFloat16).t(),
                   w = randn({64, 256}, 11, at::kBFloat16).narrow(1, 64, 128);
  for (const Isa isa : levels()) EXPECT_SAME(matvec(x, w, {}, isa), matvec(x.contiguous(), w.contiguous(), {}, isa));
}

TEST("with an adapter: by the kernels while nothing is recorded, by the dense product in training") {
  Linear linear(128, 32, true);
  linear.weight.quantized = Nf4Tensor::quantize(randn({32, 128}, 12), true);
  linear.bias.value = randn({32}, 13);
  LoraLayer lora;
  lora.a = randn({4, 128}, 14).requires_grad_(true);
  lora.b = randn({32, 4}, 15).requires_grad_(true);
  linear.lora = &lora;
  const at::Tensor x = randn({2, 128}, 16), dense = linear.weight.quantized->dequantize();
  const at::Tensor pair = at::mm(at::mm(x, lora.a.detach().t()), lora.b.detach().t());
  const at::Tensor expected = at::linear(x, dense, linear.bias.value) + pair;
  EXPECT_CLOSE(linear.forward(x).detach(), expected, 1e-4);
  const at::NoGradGuard no_grad;
  EXPECT_CLOSE(linear.forward(x), matvec(x, *linear.weight.quantized, linear.bias.value) + pair, 1e-5);
}

namespace {

DecoderConfig small_decoder() {
  DecoderConfig config;
  config.vocab_size = 96;
  config.hidden_size = 128;
  config.intermediate_size = 192;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 32;
  config.qkv_bias = true;
  return config;
}

}  // namespace

TEST("decoding from quantised weights follows the same decoder with the dequantised ones in float32") {
  const c10::InferenceMode inference;
  for (const auto& [method, dtype] : std::vector<std::pair<Method, at::ScalarType>>{
           {Method::kInt8, at::kFloat}, {Method::kNf4, at::kFloat}, {Method::kNf4, at::kBFloat16}}) {
    const RandomDecoder own = random_decoder(small_decoder(), dtype, at::kCPU, {method, true});
    const RandomDecoder dense = random_decoder(small_decoder(), at::kFloat, at::kCPU, {}, &own);
    const at::Tensor prompt = at::arange(12, at::kLong);
    Reference actual(own, prompt), expected(dense, prompt);
    for (int i = 0; i < 16; ++i) {
      const double spread = expected.logits.std().item<double>();
      EXPECT_CLOSE(actual.logits.to(at::kFloat), expected.logits, (dtype == at::kFloat ? 1e-4 : 0.12) * spread);
      const auto token = expected.logits.argmax().item<int64_t>();
      // Rounding to 8 bits turns ties.
      if (dtype == at::kFloat) EXPECT_EQ(actual.logits.argmax().item<int64_t>(), token);
      actual.next(token);
      expected.next(token);
    }
  }
}
