// Attention with a backward of its own, by FlashAttention and by cuDNN, beside the same in float32 on the CPU.
#include "core/nn/attention.h"

#include <ATen/ATen.h>

#include <array>

#include "check.h"
#include "core/base/rng.h"
#include "cuda/gpu.h"

using namespace martlet;
using namespace martlet::test;

namespace {

struct Shape {
  int64_t rows, length, heads, kv_heads, head_dim;
};

double away(const at::Tensor& a, const at::Tensor& expected) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = expected.to(at::kDouble);
  return ((x - y).abs().max() / y.abs().max()).item<double>();
}

}  // namespace

TEST("rows of one length that recur are cuDNN's, and have its gradients right; others stay with FlashAttention") {
  gpu();  // before autograd's threads, one for each device, are started
  for (const Shape& s :
       {Shape{2, 96, 4, 4, 64}, {3, 40, 6, 2, 128}, {1, 17, 4, 1, 80}, {2, 5, 2, 2, 128}, {2, 200, 2, 2, 16}}) {
    const std::string what =
        std::to_string(s.rows) + " x " + std::to_string(s.length) + " of " + std::to_string(s.head_dim);
    const int64_t tokens = s.rows * s.length, heads = s.heads + 2 * s.kv_heads;
    // q, k and v side by side in rows with a gap after them, as a layer has them.
    const at::Tensor values = randn({tokens, heads * s.head_dim + 8}, 1).to(at::kBFloat16);
    const at::Tensor dout = randn({tokens, s.heads, s.head_dim}, 2).to(at::kBFloat16);
    const auto part = [&](const at::Tensor& x, int64_t begin, int64_t count) {
      return x.narrow(1, begin * s.head_dim, count * s.head_dim).unflatten(1, {count, s.head_dim});
    };
    const auto parts = [&](const at::Tensor& x) -> std::array<at::Tensor, 3> {
      return {part(x, 0, s.heads), part(x, s.heads, s.kv_heads), part(x, s.heads + s.kv_heads, s.kv_heads)};
    };
    const std::vector<int64_t> lengths(s.rows, s.length);
    const SequenceLengths here = SequenceLengths::from_lengths(lengths, at::kCPU);
    const auto [q, k, v] = parts(values.to(at::kFloat));
    AttentionPass reference(q, k, v, here);
    const at::Tensor expected = reference.out();
    const std::array<at::Tensor, 3> gradients = reference.backward(dout.to(at::kFloat));
    SequenceLengths rows = SequenceLengths::from_lengths(lengths, gpu());
    const at::Tensor on_gpu = values.to(gpu());
    bool planned = false;
    for (const bool recurring : {false, true}) {
      rows.recurring = recurring;
      for (int i = 0; i < 70; ++i) {
        const auto [gq, gk, gv] = parts(on_gpu);
        AttentionPass pass(gq, gk, gv, rows);
        EXPECT(recurring || !pass.planned());
        // The last by FlashAttention and the last by cuDNN.
        planned = pass.planned();
        if (i < 69) continue;
        EXPECT(away(pass.out(), expected) < 0.01);
        const std::array<at::Tensor, 3> own = pass.backward(dout.to(gpu()));
        for (int n = 0; n < 3; ++n) {
          EXPECT(own[n].sizes() == gradients[n].sizes());
          EXPECT(away(own[n], gradients[n]) < 0.02);
        }
      }
    }
    std::printf("  %s: %s\n", what.c_str(), planned ? "cuDNN" : "cuDNN refuses it");
    if (s.length >= 17) EXPECT(planned);
  }
}
