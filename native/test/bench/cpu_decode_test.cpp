// Tokens a second of a random decoder of Qwen2-1.5B's shape on the CPU, by the generator's own path, and the GB/s of
// its products beside ATen's.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "check.h"
#include "core/nn/matvec.h"
#include "random_decoder.h"

using namespace martlet;
using namespace martlet::test;

namespace {

using Method = QuantizationOptions::Method;
const std::vector<std::pair<const char*, QuantizationOptions>> kStorages = {
    {"bf16", {}}, {"int8", {Method::kInt8, false}}, {"nf4", {Method::kNf4, true}}};

// The shortest of several runs: other processes share the cores.
double seconds(int repeats, const std::function<void()>& fn) {
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    fn();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

void print_machine() {
  double load = 0;
  getloadavg(&load, 1);
  std::printf("  %d threads, load average %.1f\n", at::get_num_threads(), load);
}

}  // namespace

TEST("GB/s of a product of one row") {
  const at::NoGradGuard no_grad;
  print_machine();
  for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{{1536, 1536}, {8960, 1536}, {1536, 8960}}) {
    // More than the caches hold, read in turn.
    const int64_t copies = (int64_t{3} << 28) / (out * in * 2);
    const at::Tensor x = randn({1, in}, 1, at::kBFloat16), w = randn({out, in}, 2, at::kBFloat16);
    for (const auto& [name, options] : kStorages) {
      std::vector<at::Tensor> dense;
      std::vector<QuantizedPtr> quantized;
      for (int64_t i = 0; i < copies; ++i) {
        if (options.enabled()) {
          quantized.push_back(quantize(w, options));
        } else {
          dense.push_back(w.clone());
        }
      }
      const double bytes = options.enabled() ? quantized[0]->nbytes() : dense[0].nbytes();
      const auto rate = [&](int repeats, int64_t count, const std::function<void(int64_t)>& fn) {
        const double time = seconds(repeats, [&] {
          for (int64_t i = 0; i < count; ++i) fn(i);
        });
        return bytes * static_cast<double>(count) / time / 1e9;
      };
      const double aten = rate(2, options.enabled() ? 2 : copies, [&](int64_t i) {
        at::linear(x, options.enabled() ? quantized[i]->dequantize() : dense[i]);
      });
      std::printf("  %s %lld x %lld: ATen %.1f", name, static_cast<long long>(out), static_cast<long long>(in), aten);
      for (const auto& [level, isa] : std::vector<std::pair<const char*, Isa>>{{"plain", Isa::kPlain},
                                                                               {"avx2", Isa::kAvx2},
                                                                               {"avx512", Isa::kAvx512},
                                                                               {"avx512bf16", Isa::kAvx512Bf16}}) {
        if (!is_supported(isa)) continue;
        const int64_t count = isa == Isa::kPlain ? std::min<int64_t>(copies, 4) : copies;
        const double own = rate(4, count, [&](int64_t i) {
          options.enabled() ? matvec(x, *quantized[i], {}, isa) : matvec(x, dense[i], {}, isa);
        });
        std::printf(", %s %.1f", level, own);
      }
      std::printf(" GB/s\n");
      std::fflush(stdout);
    }
  }
}

TEST("tokens a second of Qwen2-1.5B's shape") {
  const c10::InferenceMode inference;
  DecoderConfig config;
  config.vocab_size = 151936;
  config.hidden_size = 1536;
  config.intermediate_size = 8960;
  config.num_layers = 28;
  config.num_heads = 12;
  config.num_kv_heads = 2;
  config.head_dim = 128;
  config.qkv_bias = true;
  for (const auto& [name, options] : kStorages) {
    const RandomDecoder decoder = random_decoder(config, at::kBFloat16, at::kCPU, options);
    double prefill = 0;
    std::unique_ptr<Reference> run;
    prefill = seconds(1, [&] { run = std::make_unique<Reference>(decoder, at::arange(256, at::kLong)); });
    const double token = seconds(24, [&] { run->next(run->logits.argmax().item<int64_t>()); });
    std::printf("  %s: %.1f tokens/s, prefill of 256 %.0f tokens/s\n", name, 1 / token, 256 / prefill);
    std::fflush(stdout);
    EXPECT(std::isfinite(run->logits.sum().item<double>()));
  }
  print_machine();
}
