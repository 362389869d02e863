// How near decoding comes to the memory's bandwidth: each matrix at the sizes of a 7B model, and a whole random one.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <functional>

#include "check.h"
#include "core/base/cuda_kernels.h"
#include "core/base/memory.h"
#include "cuda/gpu.h"
#include "random_decoder.h"

using namespace martlet;
using namespace martlet::test;

namespace {

double seconds(int64_t repeats, const std::function<void()>& fn) {
  for (int i = 0; i < 3; ++i) fn();
  synchronize(gpu());
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) fn();
  synchronize(gpu());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / static_cast<double>(repeats);
}

// Bytes/s that a device copy reads and writes.
double copy_bandwidth() {
  const at::Tensor from = at::empty({int64_t{1} << 30}, at::dtype(at::kByte).device(gpu())), to = at::empty_like(from);
  return 2.0 * static_cast<double>(from.numel()) / seconds(10, [&] { at::Tensor(to).copy_(from); });
}

using Method = QuantizationOptions::Method;
const std::vector<std::pair<const char*, QuantizationOptions>> kStorages = {
    {"bf16", {}}, {"int8", {Method::kInt8, false}}, {"nf4", {Method::kNf4, true}}};

}  // namespace

TEST("GB/s of matrix times vector, and times several") {
  const at::NoGradGuard no_grad;
  const at::Tensor any = at::empty({1}, at::dtype(at::kBFloat16).device(gpu()));
  const cuda::DecodeKernels& kernels = cuda_kernels(any)->decode;
  const double copy = copy_bandwidth();
  std::printf("  device copy %.0f GB/s\n", copy / 1e9);
  for (const auto& [name, quantization] : kStorages) {
    for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
             {3584, 3584}, {4608, 3584}, {18944, 3584}, {3584, 18944}, {11008, 4096}, {4096, 11008}, {152064, 3584}}) {
      // More than the second-level cache holds, read in turn.
      const int64_t copies = std::max<int64_t>(1, (int64_t{1} << 29) / (rows * columns * 2));
      std::vector<at::Tensor> dense;
      std::vector<QuantizedPtr> quantized;
      std::vector<cuda::Matrix> parts;
      double bytes = 0;
      for (int64_t i = 0; i < copies; ++i) {
        at::Tensor w = at::empty({rows, columns}, any.options()).normal_(0, 0.02);
        cuda::Matrix part = {};
        if (quantization.enabled()) {
          quantized.push_back(quantize(w, quantization));
          quantized.back()->describe(part);
          bytes = static_cast<double>(quantized.back()->nbytes());
        } else {
          part.weight = w.const_data_ptr();
          bytes = static_cast<double>(w.nbytes());
          dense.push_back(w);
        }
        part.rows = static_cast<int32_t>(rows);
        part.columns = static_cast<int32_t>(columns);
        parts.push_back(part);
      }
      const at::Tensor x = at::empty({16, columns}, any.options()).normal_(), y = at::empty({16, rows}, any.options());
      const at::Tensor sums =
          at::empty({2 * cuda::kProductBlocks, 16, cuda::kProductRows}, any.options().dtype(at::kFloat));
      const at::Tensor arrived = at::zeros({cuda::kProductBlocks}, any.options().dtype(at::kInt));
      struct Form {
        int32_t batch;
        bool normed;
      };
      for (const auto& [batch, normed] :
           {Form{1, false}, Form{1, true}, Form{2, false}, Form{4, false}, Form{8, false}, Form{16, false}}) {
        if (normed && columns > 8192) continue;
        int64_t turn = 0;
        const double time = seconds(200, [&] {
          cuda::Matvec op = {};
          op.parts = &parts[turn++ % copies];
          op.count = 1;
          op.batch = batch;
          op.x = x.const_data_ptr();
          if (normed) op.norm.weight = x.const_data_ptr();
          op.eps = 1e-6f;
          op.out = y.mutable_data_ptr();
          op.sums = sums.mutable_data_ptr<float>();
          op.arrived = arrived.mutable_data_ptr<int32_t>();
          check_cuda(kernels.matvec(op, cuda::Type::kBFloat16, cuda_stream(x)));
        });
        std::printf("  %s %lld×%lld, %d rows%s: %.1f us, %.0f GB/s\n", name, static_cast<long long>(rows),
                    static_cast<long long>(columns), batch, normed ? " normed" : "", time * 1e6, bytes / time / 1e9);
        // A launch costs microseconds, which the large ones hide.
        if (!quantization.enabled() && rows > 100000) EXPECT(bytes / time > 0.5 * copy);
      }
    }
  }
}

TEST("GB/s of attention over the cache") {
  const at::NoGradGuard no_grad;
  const at::Tensor any = at::empty({1}, at::dtype(at::kBFloat16).device(gpu()));
  const cuda::DecodeKernels& kernels = cuda_kernels(any)->decode;
  const double copy = copy_bandwidth();
  struct Shape {
    int32_t heads, kv_heads, head_dim, batch, context;
  };
  for (const auto& [heads, kv_heads, d, batch, context] :
       {Shape{32, 32, 128, 16, 700}, Shape{32, 32, 128, 8, 700}, Shape{32, 32, 128, 4, 700}, Shape{32, 32, 128, 1, 700},
        Shape{28, 4, 128, 16, 700}, Shape{28, 4, 128, 1, 700}, Shape{28, 4, 128, 1, 16384}, Shape{32, 32, 80, 16, 700},
        Shape{32, 32, 64, 16, 700}}) {
    // Layers of more than the second-level cache holds, read in turn.
    const double bytes = 4.0 * batch * context * kv_heads * d;
    const auto layers = std::max<int64_t>(2, static_cast<int64_t>(3e8 / bytes));
    const at::Tensor cache = at::empty({layers, 2, batch, context, kv_heads, d}, any.options()).normal_();
    const at::Tensor qkv = at::empty({batch, heads + 2 * kv_heads, d}, any.options()).normal_(),
                     mixed = at::empty({batch, heads, d}, any.options());
    const at::Tensor prompts = at::full({batch}, context - 1, any.options().dtype(at::kInt)),
                     step = at::zeros({1}, prompts.options());
    const std::vector<int32_t> of_splits = {cuda::splits_for(batch, heads, kv_heads), 1, 2, 4, 8, 16, 32};
    for (const int32_t& splits : of_splits) {
      const at::Tensor partial = at::empty({batch, heads, splits, d + 2}, any.options().dtype(at::kFloat)),
                       arrivals = at::zeros({batch, heads}, prompts.options());
      std::vector<cuda::DecodeLayer> own(layers);
      for (int64_t i = 0; i < layers; ++i) {
        own[i].keys = cache[i][0].mutable_data_ptr();
        own[i].values = cache[i][1].mutable_data_ptr();
      }
      cuda::Decode op = {};
      op.layers = own.data();
      op.heads = heads;
      op.kv_heads = kv_heads;
      op.head_dim = d;
      op.batch = batch;
      op.steps = 1;
      op.capacity = context;
      op.prompts = prompts.const_data_ptr<int32_t>();
      op.splits = splits;
      op.scale = 0.1f;
      op.type = cuda::Type::kBFloat16;
      op.qkv = qkv.mutable_data_ptr();
      op.mixed = mixed.mutable_data_ptr();
      op.partial = partial.mutable_data_ptr<float>();
      op.arrivals = arrivals.mutable_data_ptr<int32_t>();
      op.step = step.mutable_data_ptr<int32_t>();
      int32_t turn = 0;
      const double time = seconds(
          200, [&] { check_cuda(kernels.attention(op, static_cast<int32_t>(turn++ % layers), cuda_stream(qkv))); });
      std::printf("  %d rows of %d positions, %d/%d heads of %d, %d parts%s: %.1f us, %.0f GB/s (copy %.0f)\n", batch,
                  context, heads, kv_heads, d, splits, &splits == of_splits.data() ? " (chosen)" : "", time * 1e6,
                  bytes / time / 1e9, copy / 1e9);
      // A launch costs microseconds, which the large one hides.
      if (&splits == of_splits.data() && batch * kv_heads == 512) EXPECT(bytes / time > 0.5 * copy);
    }
  }
}

namespace {

DecoderConfig qwen2_7b() {
  DecoderConfig config;
  config.vocab_size = 152064;
  config.hidden_size = 3584;
  config.intermediate_size = 18944;
  config.num_layers = 28;
  config.num_heads = 28;
  config.num_kv_heads = 4;
  config.head_dim = 128;
  config.qkv_bias = true;
  return config;
}

DecoderConfig opt_2_7b() {
  DecoderConfig config;
  config.norm = NormType::kLayer;
  config.vocab_size = 50304;
  config.hidden_size = 2560;
  config.intermediate_size = 10240;
  config.num_layers = 32;
  config.num_heads = config.num_kv_heads = 32;
  config.head_dim = 80;
  config.max_positions = 2048;
  config.position_offset = 2;
  config.qkv_bias = config.output_bias = config.mlp_bias = true;
  config.plain_mlp = Activation::kRelu;
  return config;
}

T5Config flan_t5_xl() {
  T5Config config;
  config.vocab_size = 32128;
  config.hidden_size = 2048;
  config.intermediate_size = 5120;
  config.num_layers = config.encoder_layers = 24;
  config.num_heads = config.num_kv_heads = 32;
  config.head_dim = 64;
  config.gated_mlp = true;
  config.activation = Activation::kGelu;
  return config;
}

// What a step reads of the weights.
double step_bytes(const RandomDecoder& decoder) {
  double bytes = static_cast<double>(decoder.head.nbytes());
  decoder.model->visit_parameters([&](const std::string& name, Parameter& p) {
    if (name.rfind("encoder.", 0) == 0) return;
    for (const char* unread : {"embed", "shared", "EncDecAttention.k", "EncDecAttention.v"}) {
      if (name.find(unread) != std::string::npos) return;
    }
    bytes += static_cast<double>(p.value.defined() ? p.value.nbytes() : p.quantized->nbytes());
  });
  return bytes;
}

double seconds_per_token(const std::function<int64_t(int64_t)>& next, int64_t steps) {
  int64_t token = next(1);
  synchronize(gpu());
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 1; i < steps; ++i) token = next(token);
  synchronize(gpu());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
         static_cast<double>(steps - 1);
}

template <typename Config>
void bench_decoder(const std::string& what, const Config& config, const QuantizationOptions& quantization, double copy,
                   int64_t lora_rank = 0) {
  constexpr int64_t kPrompt = 320, kSteps = 256, kReferenceSteps = 33;
  RandomDecoder decoder = random_decoder(config, at::kBFloat16, gpu(), quantization);
  if (lora_rank > 0) add_adapters(decoder, lora_rank, at::kBFloat16);
  const double bytes = step_bytes(decoder);
  Reference reference(decoder, at::arange(1, kPrompt + 1, at::kLong));
  for (const bool graph : {true, false}) {
    const auto fast = FastDecoder::make(*decoder.model, decoder.head, {{&reference.cache, kPrompt, kPrompt, kSteps}},
                                        {.graph = graph});
    if (fast == nullptr) return record_failure(__FILE__, __LINE__, what + ": no fast decoder was made");
    Sampler sampler({}, {});
    const double time = seconds_per_token([&](int64_t token) { return fast->next({token}, {&sampler})[0]; }, kSteps);
    std::printf("  %s%s: %.1f tok/s, %.0f GB/s (copy %.0f)\n", what.c_str(), graph ? ", graph" : "", 1 / time,
                bytes / time / 1e9, copy / 1e9);
    if (graph && !quantization.enabled() && lora_rank == 0) EXPECT(bytes / time > 0.4 * copy);
  }
  for (const size_t batch : {2, 4, 8, 16}) {
    const auto fast =
        FastDecoder::make(*decoder.model, decoder.head,
                          std::vector<FastDecoder::Row>(batch, {&reference.cache, kPrompt, kPrompt, kSteps}), {});
    if (fast == nullptr) return record_failure(__FILE__, __LINE__, what + ": no fast decoder was made");
    Sampler sampler({}, {});
    const std::vector<Sampler*> samplers(batch, &sampler);
    std::vector<int64_t> tokens(batch, 1);
    const double time = seconds_per_token(
        [&](int64_t) {
          tokens = fast->next(tokens, samplers);
          return tokens[0];
        },
        kSteps);
    std::printf("  %s, %zu rows: %.1f tok/s, %.0f GB/s\n", what.c_str(), batch, static_cast<double>(batch) / time,
                bytes / time / 1e9);
  }
  if (quantization.enabled() || lora_rank > 8) return;
  const auto by_operators = [&](int64_t token) {
    reference.next(token);
    return reference.logits.argmax().item<int64_t>();
  };
  std::printf("  %s, ATen's operations: %.1f tok/s\n", what.c_str(),
              1 / seconds_per_token(by_operators, kReferenceSteps));
}

}  // namespace

TEST("tokens/s of random decoders of 7B, OPT of 2.7B and T5 of 3B") {
  const at::NoGradGuard no_grad;
  const double copy = copy_bandwidth();
  for (const auto& [name, quantization] : kStorages) {
    bench_decoder(std::string("7B ") + name, qwen2_7b(), quantization, copy);
    bench_decoder(std::string("OPT-2.7B ") + name, opt_2_7b(), quantization, copy);
    bench_decoder(std::string("T5-XL ") + name, flan_t5_xl(), quantization, copy);
  }
}
