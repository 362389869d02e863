// What a layer's forward and backward cost: under autograd and written out, at the sizes of published models.
#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>

#include "check.h"
#include "core/base/memory.h"
#include "core/train/loss.h"
#include "cuda/gpu.h"
#include "layer_case.h"

using namespace martlet;
using namespace martlet::test;

namespace {

std::atomic<int64_t> operators{0};

// ATen operators that are called while it lives, on every thread, those inside others too.
class OperatorCount {
 public:
  OperatorCount() {
    operators = 0;
    handle_ = at::addGlobalCallback(at::RecordFunctionCallback([](const at::RecordFunction&) {
                                      ++operators;
                                      return std::unique_ptr<at::ObserverContext>();
                                    }).scopes({at::RecordScope::FUNCTION}));
  }
  ~OperatorCount() { at::removeCallback(handle_); }
  OperatorCount(const OperatorCount&) = delete;
  OperatorCount& operator=(const OperatorCount&) = delete;

 private:
  at::CallbackHandle handle_;
};

struct Shape {
  const char* name;
  int64_t hidden, intermediate, heads, kv_heads;
  bool qkv_bias;
  int64_t layers;  // of the test, one after the other
};

void measure(const Shape& shape, int64_t rows, PairForm form, bool fp8 = false) {
  LayerOptions options;
  options.config.hidden_size = shape.hidden;
  options.config.intermediate_size = shape.intermediate;
  options.config.num_heads = shape.heads;
  options.config.num_kv_heads = shape.kv_heads;
  options.config.head_dim = 128;
  options.config.qkv_bias = shape.qkv_bias;
  options.lengths = std::vector<int64_t>(rows, 1024);
  options.rank = 8;
  options.dtype = options.pair_dtype = at::kBFloat16;
  options.device = gpu();
  options.drawn_on_device = true;
  options.form = form;
  if (fp8) options.quantization = {QuantizationOptions::Method::kFp8, false};
  std::vector<std::unique_ptr<LayerCase>> layers;
  for (int64_t i = 0; i < shape.layers; ++i) layers.push_back(std::make_unique<LayerCase>(options));
  // As in a run: gradients are there and are added to.
  for (const auto& layer : layers) {
    for (auto& [name, pair] : layer->pairs) {
      pair.a.mutable_grad() = at::zeros_like(pair.a);
      pair.b.mutable_grad() = at::zeros_like(pair.b);
    }
  }
  const at::Tensor x = layers[0]->x.detach().requires_grad_(true);
  for (const bool written_out : {false, true}) {
    if (!written_out && (form == PairForm::kAugmented || fp8)) continue;
    for (const Recompute recompute : {Recompute::kNone, Recompute::kMlp, Recompute::kLayer}) {
      const auto step = [&] {
        at::Tensor hidden = x;
        for (const auto& layer : layers) {
          hidden = layer->apply(hidden, written_out, recompute);
          EXPECT_EQ(layer->took_written_out, written_out);
        }
        torch::autograd::backward({hidden}, {layers[0]->dy});
        x.mutable_grad().reset();
      };
      for (int i = 0; i < 3; ++i) step();
      synchronize(gpu());
      reset_peak_memory(gpu());
      const int64_t before = memory_stats(gpu()).allocated;
      step();
      synchronize(gpu());
      const int64_t kept = memory_stats(gpu()).peak_allocated - before;
      int64_t calls = 0;
      {
        const OperatorCount count;
        step();
        calls = operators;
      }
      synchronize(gpu());
      constexpr int kRepeats = 10;
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < kRepeats; ++i) {
        // Once an optimiser step.
        for (const auto& layer : layers) refresh_layer_pairs(*layer->layer);
        step();
      }
      const std::chrono::duration<double, std::milli> host = std::chrono::steady_clock::now() - start;
      synchronize(gpu());
      const std::chrono::duration<double, std::milli> all = std::chrono::steady_clock::now() - start;
      const double per_layer = static_cast<double>(kRepeats * shape.layers);
      std::printf(
          "  %s, %2d x 1024, %s, recompute %s: %.3f ms a layer, host %.3f ms, %3.0f operators, peak %.0f MiB a layer\n",
          shape.name, static_cast<int>(rows),
          !written_out                 ? "autograd      "
          : form == PairForm::kInPlace ? (fp8 ? "fp8, in place " : "in place      ")
          : fp8                        ? "fp8, together "
                                       : "augmented     ",
          recompute == Recompute::kNone  ? "none "
          : recompute == Recompute::kMlp ? "mlp  "
                                         : "layer",
          all.count() / per_layer, host.count() / per_layer,
          static_cast<double>(calls) / static_cast<double>(shape.layers),
          static_cast<double>(kept) / static_cast<double>(shape.layers) / (1 << 20));
      std::fflush(stdout);
    }
  }
}

}  // namespace

TEST("train-bench: milliseconds of a layer, forward and backward") {
  const Shape seven = {"7B", 4096, 11008, 32, 32, false, 4},
              grouped = {"7B, grouped heads", 3584, 18944, 28, 4, true, 4}, two = {"2B", 1536, 8960, 12, 2, true, 8};
  for (const PairForm form : {PairForm::kInPlace, PairForm::kAugmented}) {
    measure(seven, 8, form);
    measure(seven, 2, form);
    measure(grouped, 8, form);
    measure(two, 8, form);
    measure(two, 2, form);
  }
}

TEST("train-bench fp8: milliseconds of a layer, and in bfloat16 beside it") {
  if (!has_fp8_products(gpu())) {
    std::printf("  not measured: this GPU has no products in fp8\n");
    return;
  }
  const Shape seven = {"7B", 4096, 11008, 32, 32, false, 4},
              grouped = {"7B, grouped heads", 3584, 18944, 28, 4, true, 4}, two = {"2B", 1536, 8960, 12, 2, true, 8};
  for (const auto& [form, fp8] : {std::pair(PairForm::kAugmented, false), std::pair(PairForm::kInPlace, true),
                                  std::pair(PairForm::kAugmented, true)}) {
    measure(seven, 8, form, fp8);
    measure(seven, 2, form, fp8);
    measure(grouped, 8, form, fp8);
    measure(two, 8, form, fp8);
  }
}

TEST("train-bench: milliseconds of the loss, forward and backward") {
  const auto measure = [](int64_t rows, int64_t hidden_size, int64_t vocab) {
    const at::TensorOptions options = at::TensorOptions().dtype(at::kBFloat16).device(gpu());
    const at::Tensor hidden = at::empty({rows, hidden_size}, options).normal_().requires_grad_(true),
                     weight = at::empty({vocab, hidden_size}, options).normal_(0, 0.02),
                     targets = at::arange(rows, options.dtype(at::kLong));
    const auto timed = [](const auto& step) {
      for (int i = 0; i < 3; ++i) step();
      synchronize(gpu());
      reset_peak_memory(gpu());
      const int64_t before = memory_stats(gpu()).allocated;
      constexpr int kRepeats = 10;
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < kRepeats; ++i) step();
      synchronize(gpu());
      const std::chrono::duration<double, std::milli> all = std::chrono::steady_clock::now() - start;
      return std::pair(all.count() / kRepeats,
                       static_cast<double>(memory_stats(gpu()).peak_allocated - before) / (1 << 20));
    };
    const auto [own, own_memory] = timed([&] {
      torch::autograd::backward({chunked_cross_entropy(hidden, weight, targets, 1.0 / 4096).loss});
      hidden.mutable_grad().reset();
    });
    const auto [products, unused] = timed([&] {
      const at::NoGradGuard no_grad;
      for (int64_t start = 0; start < rows; start += 1024) {
        const int64_t count = std::min<int64_t>(1024, rows - start);
        at::mm(at::mm(hidden.narrow(0, start, count), weight.t()), weight);
      }
    });
    std::printf("  loss of %d rows, %d x %d: %.3f ms (its two products alone %.3f), peak %.0f MiB\n",
                static_cast<int>(rows), static_cast<int>(hidden_size), static_cast<int>(vocab), own, products,
                own_memory);
    (void)unused;
  };
  measure(3584, 4096, 32064);
  measure(3584, 1536, 151936);
}
