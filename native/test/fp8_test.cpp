// Weights in fp8: what the numbers become, the products, and a layer with such weights beside the one in full.
#include "core/quant/fp8.h"

#include <ATen/ATen.h>

#include "check.h"
#include "core/nn/activation.h"
#include "core/nn/matvec.h"
#include "core/nn/norm.h"
#include "layer_case.h"

using namespace martlet;
using namespace martlet::test;

namespace {

at::Tensor values_of(const Fp8Rows& rows) { return rows.codes.to(at::kFloat) * rows.scales.unsqueeze(1); }

LayerOptions small_layer() {
  LayerOptions options;
  options.config.num_kv_heads = 2;
  options.config.qkv_bias = true;
  options.lengths = {17, 30};
  options.quantization = {QuantizationOptions::Method::kFp8, false};
  return options;
}

// Linears of one input share a gradient's scale where they are one product, and have one each under autograd; so the
// two differ by what the gradient's 8 bits round.
void check_alike(const LayerResult& actual, const LayerResult& expected, double least, const std::string& what) {
  EXPECT_EQ(actual.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    const double near = cosine(actual.at(name), tensor);
    if (!(near > least)) record_failure(__FILE__, __LINE__, what + ", " + name + ": cosine " + std::to_string(near));
  }
}

}  // namespace

TEST("rows are scaled by their largest magnitude and rounded to the nearest number of the type") {
  at::Tensor x = randn({6, 32}, 1) * at::logspace(-6, 6, 6, 10.0, at::kFloat).unsqueeze(1);
  for (const auto& [type, largest, digits, least] :
       {std::tuple(at::kFloat8_e4m3fn, 448.0, 3, -9), std::tuple(at::kFloat8_e5m2, 57344.0, 2, -16)}) {
    const Fp8Rows rows = quantize_fp8_rows(x, type);
    EXPECT(rows.codes.scalar_type() == type);
    EXPECT_SAME(rows.scales, x.abs().amax(1) / largest);
    // Half a step: of the number's own size, or of the least numbers.
    const at::Tensor step =
        at::maximum(x.abs() * std::ldexp(1.0, -digits - 1), rows.scales.unsqueeze(1) * std::ldexp(1.0, least - 1));
    EXPECT(((values_of(rows) - x).abs() <= step * (1 + 1e-5)).all().item<bool>());
    EXPECT_CLOSE(rows.codes.to(at::kFloat).abs().amax(1), at::full({6}, largest), 0);
  }
  const at::Tensor factors = at::rand({32}, at::kFloat).add_(0.1);
  const Fp8Rows scaled = quantize_fp8_rows(x, at::kFloat8_e5m2, factors),
                expected = quantize_fp8_rows(x * factors, at::kFloat8_e5m2);
  EXPECT_SAME(scaled.codes.view(at::kByte), expected.codes.view(at::kByte));
  EXPECT_SAME(scaled.scales, expected.scales);
}

TEST("rows of zeros stay zeros, a number that is not finite makes its row NaN, others are left alone") {
  at::Tensor x = randn({4, 16}, 1);
  x[0].zero_();
  x[1][3] = std::numeric_limits<float>::quiet_NaN();
  x[2][3] = std::numeric_limits<float>::infinity();
  const at::Tensor out = values_of(quantize_fp8_rows(x, at::kFloat8_e4m3fn));
  EXPECT(out[0].eq(0).all().item<bool>());
  EXPECT(out[1].isnan().any().item<bool>());
  EXPECT(out[2].isnan().any().item<bool>());
  EXPECT(out[3].isfinite().all().item<bool>());
}

TEST("codes made with the rows: norm, SwiGLU and its gradients") {
  const at::NoGradGuard no_grad;
  const auto check = [](const Fp8Rows& codes, const at::Tensor& rows, const at::Tensor& factors = {}) {
    const Fp8Rows expected = quantize_fp8_rows(rows, at::kFloat8_e4m3fn, factors);
    EXPECT_SAME(codes.codes.view(at::kByte), expected.codes.view(at::kByte));
    EXPECT_SAME(codes.scales, expected.scales);
  };
  RmsNorm norm(32, 1e-6);
  norm.weight.value = randn({32}, 1);
  const at::Tensor x = randn({5, 32}, 2), factors = randn({64}, 3).abs_();
  at::Tensor sum = randn({5, 32}, 4), both = randn({5, 64}, 5), dy = randn({5, 32}, 6);
  RmsNorm::Scales scales;
  Fp8Rows codes;
  const at::Tensor normed = norm.forward(x, scales, {}, &codes);
  check(codes, normed);
  const at::Tensor of_sum = norm.add_forward(sum, x, scales, {}, &codes);
  check(codes, of_sum);
  const at::Tensor product = swiglu_halves(both, {}, &codes);
  check(codes, product);
  swiglu_halves_backward(both, dy, &codes, factors);
  check(codes, both, factors);
}

TEST("products with a weight in fp8, both ways: those of the quantised numbers") {
  const at::Tensor w = randn({48, 80}, 1) * at::logspace(-3, 0, 48, 10.0, at::kFloat).unsqueeze(1),
                   x = randn({7, 80}, 2), dy = randn({7, 48}, 3), bias = randn({48}, 4);
  const QuantizedPtr weight = Fp8Tensor::quantize(w);
  EXPECT(weight->sizes() == w.sizes());
  const at::Tensor dense = weight->dequantize();
  EXPECT(relative_error(dense, w) < 0.03);
  EXPECT_EQ(weight->nbytes(), 48 * 80 + 48 * 4);
  const at::Tensor xq = values_of(quantize_fp8_rows(x, at::kFloat8_e4m3fn));
  EXPECT_CLOSE(weight->linear(x, bias), at::linear(xq, dense, bias), 1e-5);
  EXPECT_CLOSE(product(x, *weight, bias), at::linear(xq, dense, bias), 1e-5);  // few rows on the CPU too
  const at::Tensor scales = w.abs().amax(1) / 448, dyq = values_of(quantize_fp8_rows(dy, kFp8Gradient, scales));
  EXPECT_CLOSE(weight->input_gradient(dy), at::mm(dyq, dense / scales.unsqueeze(1)), 1e-5);
  EXPECT(cosine(weight->input_gradient(dy), at::mm(dy, w)) > 0.99);
  const at::Tensor bf16 = Fp8Tensor::quantize(w.to(at::kBFloat16))->linear(x.to(at::kBFloat16), at::Tensor());
  EXPECT(bf16.scalar_type() == at::kBFloat16);
  EXPECT(cosine(bf16, at::linear(x, w)) > 0.999);
  EXPECT(Fp8Tensor::fits({32, 48}));
  EXPECT(!Fp8Tensor::fits({32, 40}));
  EXPECT(!Fp8Tensor::fits({8, 48}));
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kConfig, Fp8Tensor::quantize(randn({32, 40}, 1))).what(), "[32,40]");
}

TEST("stacked weights in fp8: each linear keeps its numbers, in one memory") {
  Linear a(16, 32, true), b(16, 48, true);
  a.bias.value = randn({32}, 3);
  b.bias.value = randn({48}, 4);
  a.weight.quantized = Fp8Tensor::quantize(randn({32, 16}, 1));
  b.weight.quantized = Fp8Tensor::quantize(randn({48, 16}, 2));
  const at::Tensor wa = a.weight.dense(), wb = b.weight.dense(), x = randn({5, 16}, 5);
  EXPECT(!LinearStack::of({&a, &b}, at::kFloat, nullptr).has_value());
  stack_weights({&a, &b}, PairForm::kAugmented);
  EXPECT_SAME(a.weight.dense(), wa);
  EXPECT_SAME(b.weight.dense(), wb);
  const auto stack = LinearStack::of({&a, &b}, at::kFloat, nullptr);
  EXPECT(stack.has_value());
  EXPECT(!LinearStack::of({&a, &b}, at::kBFloat16, nullptr).has_value());
  at::Tensor low;
  EXPECT_CLOSE(stack->forward(x, low), at::cat({a.forward(x), b.forward(x)}, 1), 1e-6);
  const QuantizedPtr before = a.weight.quantized;
  stack_weights({&a, &b}, PairForm::kInPlace);  // nothing to do
  EXPECT(a.weight.quantized == before);
  // One of another kind: left to the other path.
  b.weight.quantized = quantize(wb, {QuantizationOptions::Method::kInt8, true});
  EXPECT(!LinearStack::of({&a, &b}, at::kFloat, nullptr).has_value());
}

TEST(
    "stacked weights in fp8: values and gradients are those of the quantised numbers, the pairs in place or after the "
    "codes") {
  for (const PairForm form : {PairForm::kInPlace, PairForm::kAugmented}) {
    Linear a(32, 16, false), b(32, 48, false);
    const at::Tensor wa = randn({16, 32}, 1), wb = 3 * randn({48, 32}, 2), x = randn({5, 32}, 5),
                     dy = randn({5, 64}, 6);
    a.weight.quantized = Fp8Tensor::quantize(wa);
    b.weight.quantized = Fp8Tensor::quantize(wb);
    LoraLayer pair;
    pair.a = randn({4, 32}, 7).requires_grad_(true);
    pair.b = randn({48, 4}, 8).requires_grad_(true);
    pair.scaling = 0.5;
    b.lora = &pair;
    const at::Tensor before = b.weight.dense();
    stack_weights({&a, &b}, form);
    EXPECT_SAME(b.weight.dense(), before);
    const QuantizedPtr placed = b.weight.quantized;
    stack_weights({&a, &b}, form);  // nothing to do
    EXPECT(b.weight.quantized == placed);
    const auto stack = LinearStack::of({&a, &b}, at::kFloat, nullptr);
    const at::NoGradGuard no_grad;
    const at::Tensor dense = at::cat({a.weight.dense(), b.weight.dense()}),
                     scales = at::cat({wa, wb}).abs().amax(1) / 448;
    for (int step = 0; step < 2; ++step) {  // the pairs change in between
      stack->refresh_pairs();
      for (at::Tensor* part : {&pair.a, &pair.b}) part->mutable_grad() = at::ones_like(*part);
      const at::Tensor low_expected = at::mm(x, pair.a.t());
      at::Tensor low, y = at::mm(values_of(quantize_fp8_rows(x, at::kFloat8_e4m3fn)), dense.t());
      y.narrow(1, 16, 48).add_(at::mm(low_expected, pair.b.t()), 0.5);
      EXPECT_CLOSE(stack->forward(x, low), y, 1e-5);
      EXPECT_EQ(low.size(1), form == PairForm::kAugmented ? int64_t{8} : int64_t{4});  // it was taken
      const at::Tensor dyq = values_of(quantize_fp8_rows(dy, kFp8Gradient, scales)), db = dy.narrow(1, 16, 48),
                       dlow = 0.5 * at::mm(db, pair.b);
      // Sums of numbers up to a hundred.
      EXPECT_CLOSE(stack->backward(dy, low), at::mm(dyq, dense / scales.unsqueeze(1)) + at::mm(dlow, pair.a), 2e-4);
      stack->backward_a(low, x);
      EXPECT_CLOSE(pair.b.grad(), 1 + 0.5 * at::mm(db.t(), low_expected), 1e-4);
      EXPECT_CLOSE(pair.a.grad(), 1 + at::mm(dlow.t(), x), 1e-4);
      pair.a.mul_(0.5);
      pair.b.add_(0.25);
    }
    // Without the pair its room goes, and the weights stay.
    b.lora = nullptr;
    stack_weights({&a, &b}, form);
    EXPECT_SAME(b.weight.dense(), before);
    EXPECT_EQ(static_cast<const Fp8Tensor&>(*b.weight.quantized).rows().codes.storage().nbytes(), size_t{64 * 32});
  }
}

TEST("a layer in fp8, written out beside autograd, and the same bits at each level of recompute") {
  for (const PairForm form : {PairForm::kInPlace, PairForm::kAugmented}) {
    LayerOptions options = small_layer();
    options.form = form;
    LayerCase c(options);
    const LayerResult expected = c.run(/*written_out=*/false, Recompute::kNone),
                      actual = c.run(/*written_out=*/true, Recompute::kNone);
    EXPECT(c.took_written_out);
    check_alike(actual, expected, 0.995, "written out");
    for (const Recompute recompute : {Recompute::kCheap, Recompute::kMlp, Recompute::kLayer}) {
      const LayerResult again = c.run(/*written_out=*/true, recompute);
      EXPECT(c.took_written_out);
      for (const auto& [name, tensor] : actual) EXPECT_SAME(again.at(name), tensor);
      check_alike(c.run(/*written_out=*/false, recompute), expected, 0.9999, "autograd, recomputed");
    }
  }
}

TEST("a layer in fp8 beside the one in bfloat16: gradients point the same way") {
  LayerOptions options = small_layer();
  options.config.hidden_size = 128;
  options.config.intermediate_size = 256;
  options.config.head_dim = 32;
  options.config.rope_axis.assign(16, 0);
  options.dtype = options.pair_dtype = at::kBFloat16;
  LayerOptions full = options;
  full.quantization = {};
  const LayerResult expected = LayerCase(full).run(/*written_out=*/true, Recompute::kNone);
  LayerCase c(options);
  const LayerResult actual = c.run(/*written_out=*/true, Recompute::kNone);
  EXPECT(c.took_written_out);
  check_alike(actual, expected, 0.99, "fp8 and bfloat16");
}

TEST("LoRA's dropout in fp8: by autograd, beside the same in full") {
  const auto run = [](bool fp8) {
    LayerOptions options = small_layer();
    if (!fp8) options.quantization = {};
    LayerCase c(options);
    c.with_dropout_source = true;
    for (auto& [name, pair] : c.pairs) pair.dropout = 0.3;
    const LayerResult result = c.run(/*written_out=*/true, Recompute::kNone);
    EXPECT(!c.took_written_out);
    return result;
  };
  check_alike(run(true), run(false), 0.97, "dropout");  // 48 columns, and masks that thin them
}
