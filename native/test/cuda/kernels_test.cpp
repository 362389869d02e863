// Each CUDA kernel beside what it stands for: the same call on the CPU, where ATen's operations do it. Odd sizes take
// the kernels' scalar paths.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "check.h"
#include "core/base/cuda_kernels.h"
#include "core/nn/activation.h"
#include "core/nn/mlp.h"
#include "core/nn/norm.h"
#include "core/nn/rope.h"
#include "core/quant/quantized_tensor.h"
#include "core/train/loss.h"
#include "core/vision/image_ops.h"
#include "cuda/gpu.h"

using namespace martlet;
using namespace martlet::test;

namespace {

using Tensors = std::vector<at::Tensor>;
using Fn = std::function<at::Tensor(const Tensors&)>;

// |actual − expected| within `ulps` roundings of the 16-bit type at the size of the expected number, or of `floor`
// where that is larger.
void check_near(const at::Tensor& actual, const at::Tensor& expected, double ulps, double floor,
                const std::string& what) {
  const at::Tensor a = actual.cpu().to(at::kDouble), e = expected.cpu().to(at::kDouble);
  const double step = expected.scalar_type() == at::kHalf ? 0x1p-10 : 0x1p-7;
  const at::Tensor allowed = e.abs().clamp_min(floor) * (step * ulps);
  const double worst = ((a - e).abs() / allowed).max().item<double>();
  if (!(worst <= 1)) record_failure(__FILE__, __LINE__, what + ": " + std::to_string(worst * ulps) + " roundings away");
}

// Values and gradients of fn on the GPU beside those on the CPU; ulps 0: the same bits.
void compare(const std::string& what, const Fn& fn, const Tensors& inputs, double ulps) {
  EXPECT(cuda_kernels(inputs[0].to(gpu())) != nullptr);
  const auto run = [&](at::Device device) {
    Tensors leaves;
    // Copies keep the strides, which the kernels must honour.
    for (const at::Tensor& input : inputs) leaves.push_back(input.detach().to(device).requires_grad_(true));
    const at::Tensor y = fn(leaves);
    const at::Tensor dy = at::linspace(-1, 1, y.numel(), at::kFloat).view(y.sizes()).to(y.scalar_type()).to(device);
    Tensors out = {y.detach()};
    for (const at::Tensor& grad : torch::autograd::grad({y}, leaves, {dy})) out.push_back(grad);
    {
      const at::NoGradGuard no_grad;
      out.push_back(fn(leaves));
    }
    return out;
  };
  const Tensors expected = run(at::kCPU), actual = run(gpu());
  for (size_t i = 0; i < expected.size(); ++i) {
    const std::string name = what + ", " + (i == 0 ? "value" : "result " + std::to_string(i));
    if (ulps == 0) {
      EXPECT_SAME(actual[i].cpu(), expected[i]);
    } else {
      // Gradients are sums of numbers up to about 1 that may cancel.
      check_near(actual[i], expected[i], ulps, i > 0 && i <= inputs.size() ? 1 : 0.02, name);
    }
  }
}

const std::vector<at::ScalarType> kTypes = {at::kBFloat16, at::kHalf};

}  // namespace

TEST("RMSNorm and its gradient") {
  for (const at::ScalarType type : kTypes) {
    for (const int64_t columns : {1, 7, 80, 128, 513, 1280, 2049, 3584, 4096}) {
      for (const int64_t rows : {1, 5, 130}) {
        // No row is so small that its gradient is large.
        const at::Tensor noise = randn({rows, columns}, 1), x = (noise + noise.sign()).to(type);
        RmsNorm norm(columns, 1e-6);
        const at::Tensor w = (1 + 0.1 * randn({columns}, 2)).to(type);
        compare(
            "RMSNorm of " + std::to_string(rows) + "×" + std::to_string(columns),
            [&](const Tensors& in) {
              norm.weight.value = w.to(in[0].device());
              return norm.forward(in[0]);
            },
            {x}, 2);
      }
    }
  }
  RmsNorm heads(16, 1e-6);
  heads.weight.value = at::ones({16}, at::kBFloat16);
  const at::Tensor gap = randn({6, 4, 32}, 3).to(at::kBFloat16).narrow(2, 0, 16);
  compare(
      "RMSNorm of a view",
      [&](const Tensors& in) {
        heads.weight.value = heads.weight.value.to(in[0].device());
        return heads.forward(in[0]);
      },
      {gap}, 2);
}

TEST("rotary embedding and its gradient: the same bits") {
  for (const at::ScalarType type : kTypes) {
    for (const int64_t head_dim : {2, 6, 16, 80, 128}) {
      for (const bool float_table : {false, true}) {
        const at::Tensor qkv = randn({37, 3, 5, head_dim}, 1).to(type);
        const at::Tensor positions = at::arange(37, at::kLong);
        compare(
            "rotary of " + std::to_string(head_dim),
            [&](const Tensors& in) {
              const at::Device device = in[0].device();
              RotaryTable table = rotary_table(positions, head_dim, 1e4, float_table ? at::kFloat : type);
              table.cos = table.cos.to(device);
              table.sin = table.sin.to(device);
              return apply_rotary(in[0].select(1, 1), table);
            },
            {qkv}, 0);
      }
    }
  }
}

TEST("rotary embedding of three axes, whose angles come transposed") {
  const at::Tensor positions = at::stack({at::arange(37), at::arange(37) * 2, at::arange(37) * 3}).to(at::kLong);
  const std::vector<int64_t> axis = {0, 0, 1, 1, 1, 2, 2, 2};
  compare(
      "rotary of three axes",
      [&](const Tensors& in) {
        return apply_rotary(in[0], rotary_table(positions.to(in[0].device()), axis, 16, 1e4, at::kFloat));
      },
      {randn({37, 5, 16}, 1).to(at::kBFloat16)}, 2);
}

TEST("RMSNorm for a backward of one's own: of a sum, and its gradient with another added and the norm made again") {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType type : kTypes) {
    for (const int64_t columns : {7, 128, 1536, 2049, 4096}) {
      for (const int64_t rows : {1, 130}) {
        const std::string what = std::to_string(rows) + "×" + std::to_string(columns);
        const auto drawn = [&](uint64_t seed) { return randn({rows, columns}, seed).to(type); };
        const at::Tensor noise = randn({rows, columns}, 1), sum = (noise + noise.sign()).to(type), x = drawn(2),
                         dy = drawn(3), residual = drawn(4);
        RmsNorm norm(columns, 1e-6);
        const at::Tensor w = (1 + 0.1 * randn({columns}, 5)).to(type);
        const auto run = [&](at::Device device) {
          norm.weight.value = w.to(device);
          at::Tensor total = sum.clone().to(device), scales, grad = dy.clone().to(device), scales_of_x;
          const at::Tensor normed = norm.add_forward(total, x.to(device), scales);
          EXPECT_EQ(scales.defined(), device.is_cuda());
          const at::Tensor dx = norm.backward_add(total, scales, grad, residual.to(device));
          return Tensors{
              total, normed, dx, grad, norm.forward(total, scales_of_x), norm.backward(total, scales, normed)};
        };
        const Tensors expected = run(at::kCPU), actual = run(gpu());
        EXPECT_SAME(actual[0].cpu(), expected[0]);
        for (size_t i = 1; i < expected.size(); ++i)
          check_near(actual[i], expected[i], 2, i == 2 || i == 5 ? 1 : 0.02, what + ", result " + std::to_string(i));
        // What is made again has the bits of the forward.
        EXPECT_SAME(actual[3], actual[1]);
        EXPECT_SAME(actual[4], actual[1]);
      }
    }
  }
}

TEST("RMSNorm and SwiGLU into rows that lie further apart, from such rows: the same bits, and nothing between them") {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType type : kTypes) {
    for (const auto& [columns, gap] :
         std::vector<std::pair<int64_t, int64_t>>{{7, 1}, {128, 3}, {128, 64}, {4096, 64}}) {
      constexpr int64_t kRows = 33;
      const auto drawn = [&](uint64_t seed, int64_t width) { return randn({kRows, width}, seed).to(type).to(gpu()); };
      const auto apart = [&, gap = gap](const at::Tensor& x) {
        at::Tensor rows = at::full({kRows, x.size(1) + gap}, 7, x.options());
        rows.narrow(1, 0, x.size(1)).copy_(x);
        return rows.narrow(1, 0, x.size(1));
      };
      const auto check = [&, gap = gap](const at::Tensor& actual, const at::Tensor& expected) {
        EXPECT_SAME(actual.contiguous().cpu(), expected.cpu());
        const at::Tensor between = actual.as_strided({kRows, gap}, actual.strides(), actual.size(1));
        EXPECT(between.eq(7).all().item<bool>());
      };
      RmsNorm norm(columns, 1e-6);
      norm.weight.value = (1 + 0.1 * randn({columns}, 5)).to(type).to(gpu());
      const at::Tensor x = drawn(1, columns), dy = drawn(2, columns), residual = drawn(3, columns);
      const auto empty = [&, columns = columns] { return apart(at::zeros({kRows, columns}, x.options())); };
      RmsNorm::Scales scales, again;
      check(norm.forward(x, again, empty()), norm.forward(x, scales));
      at::Tensor sum = residual.clone(), other = residual.clone();
      check(norm.add_forward(sum, x, scales, empty()), norm.add_forward(other, x, again));
      at::Tensor grad = dy.clone(), grad_apart = dy.clone();
      check(norm.backward_add(sum, scales, grad_apart, apart(residual), empty()),
            norm.backward_add(sum, scales, grad, residual));
      EXPECT_SAME(grad_apart.cpu(), grad.cpu());
      at::Tensor both = drawn(4, 2 * columns), both_apart = apart(both);
      check(swiglu_halves(both_apart, empty()), swiglu_halves(both));
      at::Tensor product = dy.clone(), product_apart = dy.clone();
      swiglu_halves_backward(both_apart, product_apart);
      swiglu_halves_backward(both, product);
      check(both_apart, both);
      EXPECT_SAME(product_apart.cpu(), product.cpu());
    }
  }
}

TEST("rotary embedding in place and between tensors of other strides: the same bits") {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType type : kTypes) {
    for (const int64_t head_dim : {6, 80, 128}) {
      const at::Tensor stacked = randn({37, 5 * head_dim}, 1).to(type), other = randn({37, 3, head_dim}, 2).to(type);
      const RotaryTable table = rotary_table(at::arange(37, at::kLong), head_dim, 1e4, type);
      const auto run = [&](at::Device device) {
        const at::Tensor all = stacked.clone().to(device), from = other.to(device);
        const RotaryTable own = {table.cos.to(device), table.sin.to(device)};
        const auto heads = [&](int64_t begin, int64_t count) {
          return all.narrow(1, begin * head_dim, count * head_dim).unflatten(1, {count, head_dim});
        };
        rotate(heads(0, 2), heads(0, 2), own, /*inverse=*/false);
        rotate(heads(2, 3), from, own, /*inverse=*/true);
        return all.cpu();
      };
      EXPECT_SAME(run(gpu()), run(at::kCPU));
    }
  }
}

TEST("SwiGLU of halves of rows and its gradients in place") {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType type : kTypes) {
    for (const int64_t columns : {1, 9, 344, 3424}) {
      const at::Tensor gate_up = (3 * randn({33, 2 * columns}, 1)).to(type), dy = randn({33, columns}, 2).to(type);
      const auto run = [&](at::Device device) {
        at::Tensor both = gate_up.clone().to(device), grad = dy.clone().to(device);
        const at::Tensor product = swiglu_halves(both);
        swiglu_halves_backward(both, grad);
        EXPECT_SAME(grad, product);
        return Tensors{product, both};
      };
      const Tensors expected = run(at::kCPU), actual = run(gpu());
      const std::string what = "SwiGLU of " + std::to_string(columns);
      check_near(actual[0], expected[0], 2, 0.02, what);
      check_near(actual[1], expected[1], 2, 1, what + ", gradients");
    }
  }
}

TEST("cross-entropy of 16-bit logits: losses, first largest logit and gradient, one chunk and several") {
  for (const at::ScalarType type : kTypes) {
    // An identity of a head: the logits are the hidden states themselves, ties and all, so only the rows' own
    // arithmetic differs. Odd widths take the scalar path.
    for (const auto& [rows, vocab] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {33, 7}, {5, 264}, {130, 2049}, {600, 4096}}) {
      const at::Tensor logits = (4 * randn({rows, vocab}, 1)).to(type), head = at::eye(vocab).to(type);
      at::Tensor targets = at::arange(rows, at::kLong).remainder(vocab);
      targets.narrow(0, 0, rows / 2).copy_(logits.narrow(0, 0, rows / 2).argmax(1));
      for (const double smoothing : {0.0, 0.1}) {
        const double scale = 3.0 / static_cast<double>(rows);
        const auto run = [&](at::Device device) {
          const at::Tensor hidden = logits.to(device).requires_grad_(true), weight = head.to(device);
          const LossOutput out = chunked_cross_entropy(hidden, weight, targets.to(device), scale, smoothing);
          const at::Tensor grad = torch::autograd::grad({out.loss}, {hidden})[0];
          const at::NoGradGuard no_grad;
          return Tensors{out.loss.detach().cpu(), out.correct.cpu(),
                         target_logprobs(hidden, weight, targets.to(device)).cpu(), grad.cpu()};
        };
        const Tensors expected = run(at::kCPU), actual = run(gpu());
        const std::string what = std::to_string(rows) + "×" + std::to_string(vocab);
        EXPECT_CLOSE(actual[0], expected[0], 2e-6 * std::max(1.0, expected[0].item<double>()));
        EXPECT_EQ(actual[1].item<int64_t>(), expected[1].item<int64_t>());
        EXPECT_CLOSE(actual[2], expected[2], 1e-5 * std::max(1.0, expected[2].abs().max().item<double>()));
        // Half's numbers below 2^-14 are rounded to fewer digits.
        const double floor = std::max(1e-3 * scale, type == at::kHalf ? 0x1p-14 : 0);
        check_near(actual[3], expected[3], 2, floor, "cross-entropy of " + what + ", gradient");
      }
    }
  }
  // Several chunks: 2^26 / 2^18 = 256 rows at a time.
  const at::Tensor hidden = randn({600, 8}, 1).to(at::kBFloat16), head = randn({1 << 18, 8}, 2).to(at::kBFloat16),
                   targets = at::arange(600, at::kLong);
  const auto run = [&](at::Device device) {
    const at::Tensor leaf = hidden.to(device).requires_grad_(true);
    const LossOutput out = chunked_cross_entropy(leaf, head.to(device), targets.to(device), 1.0 / 600);
    return Tensors{out.loss.detach().cpu(), torch::autograd::grad({out.loss}, {leaf})[0].cpu()};
  };
  const Tensors expected = run(at::kCPU), actual = run(gpu());
  EXPECT_CLOSE(actual[0], expected[0], 1e-3);
  check_near(actual[1], expected[1], 4, expected[1].abs().max().item<double>() / 4, "cross-entropy in chunks");
}

TEST("SwiGLU and its gradients") {
  for (const at::ScalarType type : kTypes) {
    for (const int64_t columns : {1, 9, 344, 3424}) {
      compare(
          "SwiGLU of " + std::to_string(columns), [](const Tensors& in) { return swiglu(in[0], in[1]); },
          {(3 * randn({33, columns}, 1)).to(type), randn({33, columns}, 2).to(type)}, 2);
    }
  }
}

TEST("QuickGELU") {
  for (const at::ScalarType type : kTypes) {
    for (const int64_t n : {1, 8, 33, 4096}) {
      compare(
          "QuickGELU of " + std::to_string(n),
          [](const Tensors& in) { return activate(in[0], Activation::kQuickGelu); }, {(3 * randn({33, n}, 1)).to(type)},
          2);
    }
  }
}

TEST("NF4 and int8 weights: dequantised to the same bits as on the CPU, quantised alike") {
  for (const at::ScalarType type : kTypes) {
    for (const auto& [rows, columns] :
         std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {64, 64}, {129, 344}, {300, 1000}}) {
      at::Tensor weight = (0.05 * randn({rows, columns}, 1)).to(type);
      weight.select(1, columns / 2).mul_(20);  // an outlier column
      for (const bool nested : {true, false}) {
        for (const auto method : {QuantizationOptions::Method::kNf4, QuantizationOptions::Method::kInt8}) {
          const QuantizationOptions options = {method, nested};
          const QuantizedPtr here = quantize(weight, options);
          const auto read = [&](at::Device device) {
            const auto stored = here->stored();
            return read_quantized(
                "w.weight",
                [&](const std::string& suffix) {
                  for (const auto& [name, part] : stored) {
                    if (name == suffix) return part;
                  }
                  return at::Tensor();
                },
                weight.sizes(), type, device);
          };
          const QuantizedPtr on_gpu = read(gpu());
          EXPECT_SAME(on_gpu->dequantize().cpu(), read(at::kCPU)->dequantize());
          for (const int64_t gap : {8, 3}) {
            // Rows apart, and what lies between them stays.
            const at::Tensor wide = at::full({rows, columns + gap}, 7, weight.options().device(gpu()));
            on_gpu->dequantize_to(wide.narrow(1, 0, columns));
            EXPECT_SAME(wide.narrow(1, 0, columns).cpu(), read(at::kCPU)->dequantize());
            EXPECT(wide.narrow(1, columns, gap).eq(7).all().item<bool>());
          }
          // Not each code: sums are rounded in another order there, and a number between two codes falls to either
          // side.
          const at::Tensor expected = here->dequantize().to(at::kFloat);
          const at::Tensor difference =
              quantize(weight.to(gpu()), options)->dequantize().cpu().to(at::kFloat) - expected;
          const double distance = (difference.norm() / expected.norm()).item<double>();
          if (!(distance < 2e-3)) {
            record_failure(__FILE__, __LINE__,
                           (method == QuantizationOptions::Method::kNf4 ? "NF4 of " : "int8 of ") +
                               std::to_string(rows) + " x " + std::to_string(columns) + ": " +
                               std::to_string(distance) + " of the norm away");
          }
        }
      }
    }
  }
}

TEST("a gated MLP of unaligned width, padded for the tensor cores") {
  for (const int64_t hidden : {3420, 172}) {
    GatedMlp mlp(128, hidden, /*bias=*/true);
    const auto fill = [&](Linear& linear, uint64_t seed, at::IntArrayRef shape) {
      linear.weight.value = (0.05 * randn(shape, seed)).to(at::kBFloat16);
      linear.bias.value = (0.1 * randn({shape[0]}, seed + 1)).to(at::kBFloat16);
    };
    fill(mlp.gate_proj, 1, {hidden, 128});
    fill(mlp.up_proj, 3, {hidden, 128});
    fill(mlp.down_proj, 5, {128, hidden});
    const at::Tensor x = randn({600, 128}, 7).to(at::kBFloat16);
    const at::NoGradGuard no_grad;
    const at::Tensor expected = mlp.forward(x, nullptr);
    for (Linear* linear : {&mlp.gate_proj, &mlp.up_proj, &mlp.down_proj}) {
      linear->weight.value = linear->weight.value.to(gpu());
      linear->bias.value = linear->bias.value.to(gpu());
    }
    check_near(mlp.forward(x.to(gpu()), nullptr), expected, 4, 0.1, "MLP of " + std::to_string(hidden));
  }
}

TEST("pictures are normalised and cut on the GPU with the bits that the CPU makes") {
  const at::Tensor bytes = (randn({2, 56, 84, 3}, 1) * 60 + 128).clamp(0, 255).to(at::kByte);
  ImagePlan plan;
  plan.mean = {0.48145466, 0.4578275, 0.40821073};
  plan.std = {0.26862954, 0.26130258, 0.27577711};
  for (const bool pillow : {false, true}) {
    for (const int64_t frames : {1, 2}) {
      for (const bool patches : {false, true}) {
        if (frames > 1 && !patches) continue;
        plan.pillow = pillow;
        plan.patches.reset();
        if (patches) plan.patches = {14, 2, 2};
        const Picture picture = preprocess_image(bytes.const_data_ptr<uint8_t>(), frames, 84, 56, plan);
        EXPECT_SAME(picture.on(gpu()).cpu(), picture.on(at::kCPU));
      }
    }
  }
}
