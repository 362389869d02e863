// fp8 on the GPU: codes and scales are those of the CPU, bit for bit; products; a layer beside the one in bfloat16; and
// what the parts cost at the sizes of published models.
#include "core/quant/fp8.h"

#include <ATen/ATen.h>

#include <chrono>
#include <cstdio>
#include <limits>

#include "check.h"
#include "core/base/cuda_kernels.h"
#include "core/base/memory.h"
#include "core/nn/activation.h"
#include "core/nn/norm.h"
#include "cuda/gpu.h"
#include "layer_case.h"

using namespace martlet;
using namespace martlet::test;

namespace {

void check_same_rows(const at::Tensor& x, at::ScalarType type, const at::Tensor& factors, const std::string& what) {
  const Fp8Rows expected = quantize_fp8_rows(x.contiguous(), type, factors);
  // Copies keep the strides.
  const Fp8Rows actual = quantize_fp8_rows(x.to(gpu()), type, factors.defined() ? factors.to(gpu()) : at::Tensor());
  const at::Tensor differ = actual.codes.cpu().view(at::kByte).ne(expected.codes.view(at::kByte));
  const int64_t count = differ.sum().item<int64_t>();
  if (count > 0) {
    const at::Tensor first = differ.nonzero()[0];
    const int64_t r = first[0].item<int64_t>(), c = first[1].item<int64_t>();
    record_failure(__FILE__, __LINE__,
                   what + ": " + std::to_string(count) + " codes differ, first at " + std::to_string(r) + ", " +
                       std::to_string(c) + ": " +
                       std::to_string(actual.codes.cpu().to(at::kFloat)[r][c].item<float>()) + ", not " +
                       std::to_string(expected.codes.to(at::kFloat)[r][c].item<float>()));
  }
  EXPECT_SAME(actual.scales.cpu(), expected.scales);
}

bool measured() {
  if (has_fp8_products(gpu())) return true;
  std::printf("  not run: this GPU has no products in fp8\n");
  return false;
}

double milliseconds(const std::function<void()>& step) {
  for (int i = 0; i < 5; ++i) step();
  synchronize(gpu());
  constexpr int kRepeats = 20;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRepeats; ++i) step();
  synchronize(gpu());
  const std::chrono::duration<double, std::milli> all = std::chrono::steady_clock::now() - start;
  return all.count() / kRepeats;
}

}  // namespace

TEST("fp8: rows become the same bits as on the CPU") {
  EXPECT(cuda_kernels(at::empty({0}, at::TensorOptions().dtype(at::kBFloat16).device(gpu()))) != nullptr);
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    for (const int64_t columns : {16, 48, 1536, 4096, 11008, 12288, 22016, 37888, 65536}) {
      for (const at::ScalarType type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
        const int64_t count = 5;
        at::Tensor x =
            (randn({count, columns}, 1) * at::tensor({1e-3f, 1.0f, 30.0f, 0.0f, 1.0f}).unsqueeze(1)).to(dtype);
        const at::Tensor factors = randn({columns}, 2).abs_() * 1e-4;
        const std::string what = std::to_string(columns) + (type == at::kFloat8_e5m2 ? " e5m2" : " e4m3");
        check_same_rows(x, type, {}, what);
        check_same_rows(x, type, factors, what + ", factors");
        const at::Tensor wide = at::zeros({count, columns + 64}, dtype), gap = wide.narrow(1, 0, columns);
        gap.copy_(x);
        check_same_rows(gap, type, factors, what + ", rows with gaps");
      }
    }
  }
  const at::Tensor bad = at::ones({3, 64}, at::kBFloat16);
  bad[0][5] = std::numeric_limits<float>::quiet_NaN();
  bad[1][5] = std::numeric_limits<float>::infinity();
  const at::Tensor codes = quantize_fp8_rows(bad.to(gpu()), at::kFloat8_e4m3fn).codes.cpu().to(at::kFloat);
  EXPECT(codes[0].isnan().any().item<bool>());
  EXPECT(codes[1].isnan().any().item<bool>());
  EXPECT(codes[2].isfinite().all().item<bool>());
}

TEST("fp8: codes made with the rows are those made of the rows afterwards, and the rows have the same bits") {
  const at::NoGradGuard no_grad;
  const auto check_codes = [](const Fp8Rows& actual, const at::Tensor& rows, const at::Tensor& factors,
                              const std::string& what) {
    const Fp8Rows expected = quantize_fp8_rows(rows, at::kFloat8_e4m3fn, factors);
    const int64_t count = actual.codes.view(at::kByte).ne(expected.codes.view(at::kByte)).sum().item<int64_t>();
    if (count > 0) record_failure(__FILE__, __LINE__, what + ": " + std::to_string(count) + " codes differ");
    EXPECT_SAME(actual.scales.cpu(), expected.scales.cpu());
  };
  // NaN too.
  const auto check_bits = [](const at::Tensor& actual, const at::Tensor& expected, const std::string& what) {
    const int64_t count =
        actual.contiguous().view(at::kShort).ne(expected.contiguous().view(at::kShort)).sum().item<int64_t>();
    if (count > 0) record_failure(__FILE__, __LINE__, what + ": " + std::to_string(count) + " numbers differ");
  };
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    for (const int64_t columns : {16, 80, 528, 2048, 2064, 4096, 11008, 18944, 24080}) {
      for (const int64_t count : {1, 7, 80}) {
        const std::string what = std::to_string(count) + " x " + std::to_string(columns);
        const auto drawn = [&](int64_t width, uint64_t seed) {
          at::Tensor x = randn({count, width}, seed).to(type).to(gpu());
          if (count > 5) {
            x[3].zero_();
            x[4][5] = std::numeric_limits<float>::quiet_NaN();
            x[5].mul_(1e-3);
          }
          return x;
        };
        RmsNorm norm(columns, 1e-6);
        norm.weight.value = (1 + 0.1 * randn({columns}, 5)).to(type).to(gpu());
        const at::Tensor x = drawn(columns, 1);
        RmsNorm::Scales scales;
        Fp8Rows codes;
        const at::Tensor normed = norm.forward(x, scales, {}, &codes);
        check_bits(normed, norm.forward(x, scales), what + ", norm");
        check_codes(codes, normed, {}, what + ", norm");
        at::Tensor sum = drawn(columns, 2), plain_sum = sum.clone();
        const at::Tensor of_sum = norm.add_forward(sum, x, scales, {}, &codes);
        check_bits(of_sum, norm.add_forward(plain_sum, x, scales), what + ", norm of a sum");
        check_bits(sum, plain_sum, what + ", sum");
        check_codes(codes, of_sum, {}, what + ", norm of a sum");

        at::Tensor both = drawn(2 * columns, 3), both_plain = both.clone();
        const at::Tensor product = swiglu_halves(both, {}, &codes);
        check_bits(product, swiglu_halves(both), what + ", SwiGLU");
        check_codes(codes, product, {}, what + ", SwiGLU");
        // Rows that the kernel with codes does not take: by two kernels.
        at::Tensor apart = at::zeros({count, 2 * columns + 3}, both.options()).narrow(1, 0, 2 * columns);
        apart.copy_(both);
        check_bits(swiglu_halves(apart, {}, &codes), product, what + ", SwiGLU of rows apart");
        check_codes(codes, product, {}, what + ", SwiGLU of rows apart");

        if (2 * columns > 65536) continue;
        const at::Tensor factors = (randn({2 * columns}, 4).abs_() * 1e-4).to(gpu());
        at::Tensor dy = drawn(columns, 6), dy_plain = dy.clone();
        swiglu_halves_backward(both, dy, &codes, factors);
        swiglu_halves_backward(both_plain, dy_plain);
        check_bits(both, both_plain, what + ", SwiGLU's gradients");
        check_bits(dy, dy_plain, what + ", SwiGLU made again");
        check_codes(codes, both, factors, what + ", SwiGLU's gradients");
      }
    }
  }
}

TEST("fp8: bytes transposed") {
  for (const auto& [rows, columns] : {std::pair(4, 4), std::pair(16, 48), std::pair(128, 128), std::pair(144, 400),
                                      std::pair(1536, 8960), std::pair(4096, 11008)}) {
    const at::Tensor x = at::randint(256, {rows, columns}, at::kInt).to(at::kByte);
    EXPECT_SAME(transpose_bytes(x.to(gpu())).cpu(), x.t().contiguous());
  }
}

TEST("fp8: products beside those of the CPU") {
  if (!measured()) return;
  for (const auto& [rows, in, out] :
       {std::tuple(1, 64, 48), std::tuple(7, 256, 128), std::tuple(333, 1536, 1536), std::tuple(1024, 4096, 1024)}) {
    const at::Tensor w = (0.02 * randn({out, in}, 1)).to(at::kBFloat16), x = randn({rows, in}, 2).to(at::kBFloat16),
                     dy = randn({rows, out}, 3).to(at::kBFloat16), bias = randn({out}, 4).to(at::kBFloat16);
    const QuantizedPtr own = Fp8Tensor::quantize(w), theirs = Fp8Tensor::quantize(w.to(gpu()));
    EXPECT_SAME(theirs->dequantize().cpu(), own->dequantize());
    const double plain = relative_error(theirs->linear(x.to(gpu()), at::Tensor()), own->linear(x, at::Tensor())),
                 biased = relative_error(theirs->linear(x.to(gpu()), bias.to(gpu())), own->linear(x, bias)),
                 back = relative_error(theirs->input_gradient(dy.to(gpu())), own->input_gradient(dy));
    std::printf("  %d x %d x %d: %.5f, with bias %.5f, gradient %.5f of the CPU's away\n", rows, in, out, plain, biased,
                back);
    // bfloat16's rounding is 0.0017 of the norm; the tensor cores add up in about 14 bits.
    EXPECT(plain < 0.006 && biased < 0.006 && back < 0.006);
    const at::Tensor exact = at::mm(dy.to(at::kFloat), w.to(at::kFloat));
    const Fp8Rows& kept = static_cast<const Fp8Tensor&>(*own).rows();
    const Fp8Rows e5m2 = quantize_fp8_rows(dy, at::kFloat8_e5m2, kept.scales);
    std::printf(
        "    gradient from the exact one: %.4f by e4m3, %.4f by e5m2\n", relative_error(own->input_gradient(dy), exact),
        relative_error(fp8_product(e5m2, {transpose_bytes(kept.codes), static_cast<const Fp8Tensor&>(*own).units()}, {},
                                   at::kBFloat16),
                       exact));
  }
}

TEST("fp8: a layer's value and gradients beside bfloat16's") {
  if (!measured()) return;
  for (const auto& [grouped, form] : {std::pair(false, PairForm::kInPlace), std::pair(false, PairForm::kAugmented),
                                      std::pair(true, PairForm::kAugmented)}) {
    LayerOptions options;
    options.form = form;
    options.config.hidden_size = 1024;
    options.config.intermediate_size = 2816;
    options.config.num_heads = 16;
    options.config.num_kv_heads = grouped ? 4 : 16;
    options.config.head_dim = 64;
    options.config.qkv_bias = grouped;
    options.config.rope_axis.assign(32, 0);
    options.lengths = {300, 211, 1, 512};
    options.rank = 8;
    options.dtype = options.pair_dtype = at::kBFloat16;
    options.device = gpu();
    LayerOptions full = options;
    options.quantization = {QuantizationOptions::Method::kFp8, false};
    const LayerResult expected = LayerCase(full).run(/*written_out=*/true, Recompute::kNone);
    LayerCase c(options);
    LayerResult first;
    for (const Recompute recompute : {Recompute::kNone, Recompute::kMlp, Recompute::kLayer}) {
      const LayerResult actual = c.run(/*written_out=*/true, recompute);
      EXPECT(c.took_written_out);
      if (first.empty()) first = actual;
      for (const auto& [name, tensor] : expected) {
        const double near = cosine(actual.at(name), tensor);
        if (recompute == Recompute::kNone) std::printf("  %s: cosine %.5f\n", name.c_str(), near);
        if (!(near > 0.99)) record_failure(__FILE__, __LINE__, name + ": cosine " + std::to_string(near));
      }
    }
    const LayerResult autograd = c.run(/*written_out=*/false, Recompute::kNone);
    for (const auto& [name, tensor] : autograd) {
      const double near = cosine(first.at(name), tensor);
      if (!(near > 0.99)) record_failure(__FILE__, __LINE__, name + ": cosine to autograd's " + std::to_string(near));
    }
  }
}

TEST("train-bench fp8: codes made with the rows, and afterwards") {
  constexpr int64_t kRows = 8192, kHidden = 4096, kInner = 11008;
  const at::NoGradGuard no_grad;
  const at::TensorOptions bf16 = at::TensorOptions().dtype(at::kBFloat16).device(gpu());
  const auto report = [](const char* name, double megabytes, const std::function<void()>& together,
                         const std::function<void()>& apart) {
    const double one = milliseconds(together), two = milliseconds(apart);
    std::printf("  %-22s %.3f ms (%.0f GB/s), by two kernels %.3f\n", name, one, megabytes / one, two);
  };
  Fp8Rows codes;
  RmsNorm norm(kHidden, 1e-6);
  norm.weight.value = at::ones({kHidden}, bf16);
  RmsNorm::Scales scales;
  at::Tensor x = at::empty({kRows, kHidden}, bf16).normal_(), sum = x.clone();
  const double hidden = 1e-6 * kRows * kHidden, inner = 1e-6 * kRows * kInner;  // millions of numbers
  report(
      "sum and norm", 9 * hidden, [&] { norm.add_forward(sum, x, scales, {}, &codes); },
      [&] { quantize_fp8_rows(norm.add_forward(sum, x, scales), at::kFloat8_e4m3fn); });
  at::Tensor both = at::empty({kRows, 2 * kInner}, bf16).normal_(), dy = at::empty({kRows, kInner}, bf16).normal_();
  report(
      "SwiGLU", 7 * inner, [&] { swiglu_halves(both, {}, &codes); },
      [&] { quantize_fp8_rows(swiglu_halves(both), at::kFloat8_e4m3fn); });
  const at::Tensor factors = at::ones({2 * kInner}, bf16.dtype(at::kFloat));
  // In place, so that the numbers wander; the time does not depend on them.
  report(
      "SwiGLU's gradients", 14 * inner, [&] { swiglu_halves_backward(both, dy, &codes, factors); },
      [&] {
        swiglu_halves_backward(both, dy);
        quantize_fp8_rows(both, kFp8Gradient, factors);
      });
}

TEST("train-bench fp8: the products alone, and what is around them") {
  if (!measured()) return;
  constexpr int64_t kRows = 8192;
  const at::TensorOptions bf16 = at::TensorOptions().dtype(at::kBFloat16).device(gpu());
  double total = 0, casts = 0, turned = 0, plain = 0;
  for (const auto& [name, out, in] : {std::tuple("qkv", 12288, 4096), std::tuple("o", 4096, 4096),
                                      std::tuple("gate|up", 22016, 4096), std::tuple("down", 4096, 11008)}) {
    const at::Tensor w = at::empty({out, in}, bf16).normal_(0, 0.02), x = at::empty({kRows, in}, bf16).normal_(),
                     dy = at::empty({kRows, out}, bf16).normal_();
    const QuantizedPtr quantized = Fp8Tensor::quantize(w);
    const auto& weight = static_cast<const Fp8Tensor&>(*quantized);
    const Fp8Rows xq = quantize_fp8_rows(x, at::kFloat8_e4m3fn),
                  dyq = quantize_fp8_rows(dy, at::kFloat8_e5m2, weight.rows().scales),
                  dyq4 = quantize_fp8_rows(dy, at::kFloat8_e4m3fn, weight.rows().scales);
    const Fp8Rows transposed = {transpose_bytes(weight.rows().codes), weight.units()};
    const double forward = milliseconds([&] { fp8_product(xq, weight.rows(), {}, at::kBFloat16); }),
                 backward = milliseconds([&] { fp8_product(dyq, transposed, {}, at::kBFloat16); }),
                 backward4 = milliseconds([&] { fp8_product(dyq4, transposed, {}, at::kBFloat16); }),
                 forward16 = milliseconds([&] { at::mm(x, w.t()); }), backward16 = milliseconds([&] { at::mm(dy, w); }),
                 cast_x = milliseconds([&] { quantize_fp8_rows(x, at::kFloat8_e4m3fn); }),
                 cast_dy = milliseconds([&] { quantize_fp8_rows(dy, at::kFloat8_e5m2, weight.rows().scales); }),
                 transpose = milliseconds([&] { transpose_bytes(weight.rows().codes); });
    const double flops = 2.0 * kRows * in * out, bytes = 1e-6;
    std::printf(
        "  %-7s forward %.3f ms (%4.0f TFLOP/s; bf16 %.3f), backward %.3f (%4.0f; bf16 %.3f; e4m3 gradient %.3f), "
        "cast x %.3f (%.0f GB/s), cast dy %.3f (%.0f GB/s), transpose %.3f (%.0f GB/s)\n",
        name, forward, flops / forward * 1e-9, forward16, backward, flops / backward * 1e-9, backward16, backward4,
        cast_x, 3.0 * kRows * in / cast_x * bytes, cast_dy, 3.0 * kRows * out / cast_dy * bytes, transpose,
        2.0 * in * out / transpose * bytes);
    total += forward + backward;
    casts += cast_x + cast_dy;
    turned += transpose;
    plain += forward16 + backward16;
  }
  std::printf("  a layer: products %.3f ms (bf16 %.3f), casts %.3f, transposes %.3f; 32 of them: %.0f ms, not %.0f\n",
              total, plain, casts, turned, 32 * (total + casts + turned), 32 * plain);
}
