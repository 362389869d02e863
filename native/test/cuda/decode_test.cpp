// Decoding's kernels beside ATen's expressions in float32, and whole decoders beside the generator's own path.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <deque>
#include <functional>
#include <map>
#include <numeric>

#include "check.h"
#include "core/base/cuda_kernels.h"
#include "core/quant/quantized_tensor.h"
#include "cuda/gpu.h"
#include "random_decoder.h"

using namespace martlet;
using namespace martlet::test;

namespace {

const std::vector<at::ScalarType> kTypes = {at::kBFloat16, at::kHalf};

double distance(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.cpu().to(at::kDouble), e = expected.cpu().to(at::kDouble);
  return ((a - e).norm() / e.norm().clamp_min(1e-6)).item<double>();
}

// Of the whole, and of the worst element beside the root mean square.
void check_near(const at::Tensor& actual, const at::Tensor& expected, double whole, const std::string& what) {
  const double far = distance(actual, expected);
  const at::Tensor a = actual.cpu().to(at::kDouble), e = expected.cpu().to(at::kDouble);
  const double rms = std::max(e.square().mean().sqrt().item<double>(), 1e-6);
  const double worst = (a - e).abs().max().item<double>() / rms;
  if (!(far <= whole && worst <= 10 * whole)) {
    record_failure(__FILE__, __LINE__,
                   what + ": rel. error " + std::to_string(far) + ", worst " + std::to_string(worst));
  }
}

struct TestMatrix {
  at::Tensor dense, bias, a, b, low;
  QuantizedPtr quantized;
  cuda::Matrix described = {};
};

TestMatrix matrix(int64_t rows, int64_t columns, at::ScalarType type, const QuantizationOptions& quantization,
                  uint64_t seed, bool bias) {
  TestMatrix out;
  out.dense = (randn({rows, columns}, seed) / std::sqrt(static_cast<double>(columns))).to(type);
  // An outlier column, for int8.
  if (columns >= 64) out.dense.select(1, columns / 2).mul_(20);
  out.dense = out.dense.to(gpu());
  if (quantization.enabled()) {
    out.quantized = quantize(out.dense, quantization);
    out.quantized->describe(out.described);
    out.dense = out.quantized->dequantize();
  } else {
    out.described.weight = out.dense.const_data_ptr();
  }
  if (bias) {
    out.bias = randn({rows}, seed + 1).to(type).to(gpu());
    out.described.bias = out.bias.const_data_ptr();
  }
  out.described.rows = static_cast<int32_t>(rows);
  out.described.columns = static_cast<int32_t>(columns);
  return out;
}

const std::vector<std::pair<std::string, QuantizationOptions>> kStorages = {
    {"16 bits", {}},
    {"int8", {QuantizationOptions::Method::kInt8, false}},
    {"NF4", {QuantizationOptions::Method::kNf4, false}},
    {"NF4 with nested scales", {QuantizationOptions::Method::kNf4, true}}};

const std::vector<std::pair<Activation, cuda::Activation>> kActivations = {
    {Activation::kSilu, cuda::Activation::kSilu},
    {Activation::kGelu, cuda::Activation::kGelu},
    {Activation::kGeluTanh, cuda::Activation::kGeluTanh},
    {Activation::kQuickGelu, cuda::Activation::kQuickGelu},
    {Activation::kRelu, cuda::Activation::kRelu}};

// An adapter's pair of numbers of `type`.
void add_lora(TestMatrix& m, int64_t rank, at::ScalarType type, uint64_t seed, int64_t batch = 1) {
  const int64_t rows = m.dense.size(0), columns = m.dense.size(1);
  m.a = (randn({rank, columns}, seed) / std::sqrt(static_cast<double>(columns))).to(type).to(gpu());
  m.b = (randn({rows, rank}, seed + 1) / std::sqrt(static_cast<double>(rank))).to(type).to(gpu());
  m.low = at::full({batch, rank}, 99.0, m.a.options().dtype(at::kFloat));
  m.described.lora = {.a = m.a.const_data_ptr(),
                      .b = m.b.const_data_ptr(),
                      .low = m.low.mutable_data_ptr<float>(),
                      .scaling = 1.5f,
                      .rank = static_cast<int32_t>(rank),
                      .is_float = type == at::kFloat};
}

// What products of several rows need beside.
struct Scratch {
  at::Tensor sums, arrived;
  explicit Scratch(int64_t batch)
      : sums(at::full({2 * cuda::kProductBlocks, batch, cuda::kProductRows}, NAN, at::kFloat).to(gpu())),
        arrived(at::zeros({cuda::kProductBlocks}, at::kInt).to(gpu())) {}
  void give(cuda::Matvec& op) const {
    op.sums = sums.mutable_data_ptr<float>();
    op.arrived = arrived.mutable_data_ptr<int32_t>();
  }
};

// Of a row, or of several.
at::Tensor linear32(const TestMatrix& m, const at::Tensor& x) {
  const auto times = [](const at::Tensor& x, const at::Tensor& w) {
    return at::matmul(x.cpu().to(at::kFloat), w.cpu().to(at::kFloat).t());
  };
  at::Tensor y = times(x, m.dense);
  if (m.bias.defined()) y = y + m.bias.cpu().to(at::kFloat);
  return m.a.defined() ? y + 1.5 * times(times(x, m.a), m.b) : y;
}

}  // namespace

TEST("matrix times vector: 16 bits, int8, NF4; norms, bias, residual, three parts, activations, gated, adapters") {
  const at::NoGradGuard no_grad;
  const cuda::DecodeKernels& kernels = cuda_kernels(at::empty({1}, at::dtype(at::kHalf).device(gpu())))->decode;
  for (const at::ScalarType type : kTypes) {
    for (const auto& [name, quantization] : kStorages) {
      for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{5, 1},
                                                                                  {13, 7},
                                                                                  {70, 80},
                                                                                  {7, 64},
                                                                                  {9, 514},
                                                                                  {33, 3584},
                                                                                  {129, 520},
                                                                                  {11, 2112},
                                                                                  {21, 8192},
                                                                                  {40, 18944}}) {
        const std::string what = name + " " + std::to_string(rows) + "×" + std::to_string(columns);
        const at::Tensor x = randn({columns}, 1).to(type).to(gpu()),
                         norm = (1 + 0.1 * randn({columns}, 2)).to(type).to(gpu());
        const at::Tensor residual = randn({rows}, 3).to(type).to(gpu());
        TestMatrix a = matrix(rows, columns, type, quantization, 10, true),
                   b = matrix(rows, columns, type, quantization, 20, false),
                   c = matrix(rows + 3, columns, type, quantization, 30, true);
        // The rest of `op` is the caller's. Where `added` is given, the result is added to it.
        const auto run = [&](cuda::Matvec op, const std::vector<cuda::Matrix>& parts, int64_t n,
                             const at::Tensor& added = {}) {
          at::Tensor y = added.defined() ? added.clone() : at::full({n}, 99.0, x.options());
          op.parts = parts.data();
          op.count = static_cast<int32_t>(parts.size());
          op.x = x.const_data_ptr();
          op.eps = 1e-6f;
          op.residual = added.defined() ? y.const_data_ptr() : nullptr;
          op.out = y.mutable_data_ptr();
          check_cuda(kernels.matvec(op, cuda_type(type), cuda_stream(x)));
          return y;
        };
        check_near(run({}, {a.described}, rows, residual), linear32(a, x) + residual.cpu().to(at::kFloat), 1e-2,
                   what + " with residual");
        const bool fits = columns <= 8192;
        if (!fits) continue;
        const cuda::Norm rms = {norm.const_data_ptr(), nullptr};
        const at::Tensor normed = at::rms_norm(x.cpu(), {columns}, std::nullopt, 1e-6) * norm.cpu();
        check_near(run({.norm = rms}, {a.described, b.described, c.described}, 3 * rows + 3),
                   at::cat({linear32(a, normed), linear32(b, normed), linear32(c, normed)}), 1e-2,
                   what + ", three parts of a normed row");
        if (columns > 1) {  // one number has no deviation
          const at::Tensor bias = randn({columns}, 4).to(type).to(gpu());
          const at::Tensor layer_normed = at::layer_norm(x.cpu(), {columns}, norm.cpu(), bias.cpu(), 1e-6);
          check_near(run({.norm = {norm.const_data_ptr(), bias.const_data_ptr()}}, {a.described}, rows),
                     linear32(a, layer_normed), 1e-2, what + ", layer norm");
        }
        for (const auto& [activation, its] : kActivations) {
          const at::Tensor first = activate(linear32(a, normed), activation);
          const std::string named = what + ", activation " + std::to_string(static_cast<int>(activation));
          check_near(run({.activation = its, .norm = rms}, {a.described}, rows), first, 3e-2, named);
          check_near(run({.gated = true, .activation = its, .norm = rms}, {a.described, b.described}, rows),
                     first * linear32(b, normed), 3e-2, named + ", gated");
        }
        add_lora(a, 5, type, 40);
        add_lora(c, 70, at::kFloat, 50);
        check_near(run({.norm = rms}, {a.described, b.described, c.described}, 3 * rows + 3),
                   at::cat({linear32(a, normed), linear32(b, normed), linear32(c, normed)}), 1e-2,
                   what + ", adapters on two of three parts");
        check_near(run({}, {c.described}, rows + 3, residual.new_ones({rows + 3})), linear32(c, x) + 1, 1e-2,
                   what + ", adapter and residual");
      }
    }
  }
}

TEST("matrices times several rows: 16 bits, int8, NF4; norms, bias, residual, three parts, gated, adapters") {
  const at::NoGradGuard no_grad;
  const cuda::DecodeKernels& kernels = cuda_kernels(at::empty({1}, at::dtype(at::kHalf).device(gpu())))->decode;
  for (const at::ScalarType type : kTypes) {
    for (const auto& [name, quantization] : kStorages) {
      // Read by stages where columns are a multiple of 16 (NF4: 64), else one by one. Several blocks share a tile of
      // 128 rows, or a block has some tiles whole and parts of others.
      for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{5, 1},
                                                                                  {13, 7},
                                                                                  {70, 80},
                                                                                  {7, 64},
                                                                                  {9, 514},
                                                                                  {33, 3584},
                                                                                  {129, 520},
                                                                                  {130, 528},
                                                                                  {64, 1024},
                                                                                  {257, 1088},
                                                                                  {1537, 192},
                                                                                  {40, 18944}}) {
        for (const int64_t batch : {2, 3, 8, 9, 15, 16}) {
          const std::string what = name + " " + std::to_string(rows) + "×" + std::to_string(columns) + ", " +
                                   std::to_string(batch) + " rows";
          const at::Tensor x = randn({batch, columns}, 1).to(type).to(gpu()),
                           norm = (1 + 0.1 * randn({columns}, 2)).to(type).to(gpu());
          const at::Tensor residual = randn({batch, rows}, 3).to(type).to(gpu());
          TestMatrix a = matrix(rows, columns, type, quantization, 10, true),
                     b = matrix(rows, columns, type, quantization, 20, false),
                     c = matrix(rows + 3, columns, type, quantization, 30, true);
          const at::Tensor normed_rows = at::full_like(x, 99.0);
          const Scratch scratch(batch);
          const auto run = [&](cuda::Matvec op, const std::vector<cuda::Matrix>& parts, int64_t n,
                               const at::Tensor& added = {}) {
            at::Tensor y = added.defined() ? added.clone() : at::full({batch, n}, 99.0, x.options());
            op.parts = parts.data();
            op.count = static_cast<int32_t>(parts.size());
            op.batch = static_cast<int32_t>(batch);
            op.x = x.const_data_ptr();
            op.eps = 1e-6f;
            op.residual = added.defined() ? y.const_data_ptr() : nullptr;
            op.out = y.mutable_data_ptr();
            op.normed = normed_rows.mutable_data_ptr();
            scratch.give(op);
            check_cuda(kernels.matvec(op, cuda_type(type), cuda_stream(x)));
            return y;
          };
          check_near(run({}, {a.described}, rows, residual), linear32(a, x) + residual.cpu().to(at::kFloat), 1e-2,
                     what + " with residual");
          const cuda::Norm rms = {norm.const_data_ptr(), nullptr};
          const at::Tensor normed = at::rms_norm(x.cpu(), {columns}, std::nullopt, 1e-6) * norm.cpu();
          const auto three = [&] {
            return at::cat({linear32(a, normed), linear32(b, normed), linear32(c, normed)}, 1);
          };
          const std::vector<cuda::Matrix> parts = {a.described, b.described, c.described};
          check_near(run({.norm = rms}, parts, 3 * rows + 3), three(), 1e-2, what + ", three parts of normed rows");
          check_near(run({.gated = true, .activation = cuda::Activation::kSilu, .norm = rms},
                         {a.described, b.described}, rows),
                     activate(linear32(a, normed), Activation::kSilu) * linear32(b, normed), 3e-2, what + ", gated");
          add_lora(a, 5, type, 40, batch);
          add_lora(c, 70, at::kFloat, 50, batch);
          check_near(run({.norm = rms}, {a.described, b.described, c.described}, 3 * rows + 3), three(), 1e-2,
                     what + ", adapters on two of three parts");
          check_near(run({}, {c.described}, rows + 3, residual.new_ones({batch, rows + 3})), linear32(c, x) + 1, 1e-2,
                     what + ", adapter and residual");
        }
      }
    }
  }
}

TEST("matrices of a model's size times one row and several: shared out to all blocks, the same bits every time") {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = at::kBFloat16;
  const cuda::DecodeKernels& kernels = cuda_kernels(at::empty({1}, at::dtype(type).device(gpu())))->decode;
  // Neither rows nor columns fill their last tile or stage. Of NF4 times one row a block has several groups of rows, or
  // more than it keeps the sums of.
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{4100, 4160}, {1001, 18496}, {9001, 1088}, {70001, 64}}) {
    for (const auto& [name, quantization] : kStorages) {
      const TestMatrix a = matrix(rows, columns, type, quantization, 10, true),
                       b = matrix(rows, columns, type, quantization, 20, false);
      for (const int64_t batch : {1, 3, 16}) {
        const at::Tensor x = randn({batch, columns}, 1).to(type).to(gpu());
        const at::Tensor residual = randn({batch, rows}, 3).to(type).to(gpu());
        const Scratch scratch(batch);
        const auto check = [&](bool gated, const at::Tensor& expected) {
          const std::string what = name + " " + std::to_string(rows) + "×" + std::to_string(columns) + ", " +
                                   std::to_string(batch) + " rows" + (gated ? ", gated" : "");
          const std::vector<cuda::Matrix> parts = {a.described, b.described};
          at::Tensor before;
          for (int turn = 0; turn < 10; ++turn) {
            const at::Tensor y = residual.clone();
            cuda::Matvec op = {};
            op.parts = parts.data();
            op.count = gated ? 2 : 1;
            op.gated = gated;
            op.activation = gated ? cuda::Activation::kSilu : cuda::Activation::kNone;
            op.batch = static_cast<int32_t>(batch);
            op.x = x.const_data_ptr();
            op.residual = gated ? nullptr : y.const_data_ptr();
            op.out = y.mutable_data_ptr();
            scratch.give(op);
            check_cuda(kernels.matvec(op, cuda_type(type), cuda_stream(x)));
            if (before.defined()) EXPECT_SAME(y.cpu(), before.cpu());
            before = y;
          }
          check_near(before, expected, gated ? 3e-2 : 1e-2, what);
          EXPECT_EQ(scratch.arrived.count_nonzero().item<int64_t>(), 0);
        };
        const at::Tensor first = linear32(a, x);
        check(false, first + residual.cpu().to(at::kFloat));
        check(true, activate(first, Activation::kSilu) * linear32(b, x));
      }
    }
  }
}

TEST("NF4 times one row: parts with and without nested scales") {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = at::kBFloat16;
  const cuda::DecodeKernels& kernels = cuda_kernels(at::empty({1}, at::dtype(type).device(gpu())))->decode;
  for (const int64_t columns : {192, 1024}) {
    const TestMatrix a = matrix(37, columns, type, {QuantizationOptions::Method::kNf4, true}, 10, true),
                     b = matrix(20, columns, type, {QuantizationOptions::Method::kNf4, false}, 20, false);
    const at::Tensor x = randn({columns}, 1).to(type).to(gpu()), y = at::full({57}, 99.0, x.options());
    const std::vector<cuda::Matrix> parts = {a.described, b.described};
    cuda::Matvec op = {};
    op.parts = parts.data();
    op.count = 2;
    op.x = x.const_data_ptr();
    op.out = y.mutable_data_ptr();
    check_cuda(kernels.matvec(op, cuda_type(type), cuda_stream(x)));
    check_near(y, at::cat({linear32(a, x), linear32(b, x)}), 1e-2, "columns " + std::to_string(columns));
  }
}

TEST("attention of one query, rotary, norms of q and k, and the cache") {
  const at::NoGradGuard no_grad;
  const cuda::DecodeKernels& kernels = cuda_kernels(at::empty({1}, at::dtype(at::kHalf).device(gpu())))->decode;
  struct Shape {
    int32_t heads, kv_heads, head_dim;
  };
  for (const at::ScalarType type : kTypes) {
    for (const Shape& shape : {Shape{28, 4, 128}, Shape{32, 32, 128}, Shape{12, 2, 128}, Shape{6, 3, 64},
                               Shape{4, 4, 80}, Shape{5, 5, 96}, Shape{8, 2, 256}, Shape{3, 1, 6}}) {
      for (const int64_t context : {1, 2, 31, 33, 257, 700, 2100}) {
        for (const auto& [splits, extras] :
             std::vector<std::pair<int32_t, bool>>{{1, false}, {7, true}, {cuda::kMaxSplits, false}}) {
          const auto [heads, kv_heads, d] = shape;
          const int32_t step = context > 3 ? 2 : 0;  // of 3 steps, the rest of the context is the prompt's
          const auto on_gpu = [&](const at::Tensor& t) { return t.to(type).to(gpu()); };
          const at::Tensor qkv = on_gpu(randn({heads + 2 * kv_heads, d}, 1));
          const at::Tensor cache = on_gpu(randn({2, context + 5, kv_heads, d}, 2));
          const at::Tensor angles = randn({3, d / 2}, 3);
          const at::ScalarType table = extras ? at::kFloat : type;
          const at::Tensor cos = angles.cos().to(table).to(gpu()), sin = angles.sin().to(table).to(gpu());
          const at::Tensor q_norm = on_gpu(1 + 0.1 * randn({d}, 4)), k_norm = on_gpu(1 + 0.1 * randn({d}, 5));
          const at::Tensor scale = on_gpu(1 + 0.1 * randn({3}, 6));
          const at::Tensor mixed = on_gpu(at::zeros({heads, d})), at_step = at::full({1}, step, at::kInt).to(gpu());
          const at::Tensor partial = at::empty({heads, splits, d + 2}, at::kFloat).to(gpu()),
                           arrivals = at::zeros({heads}, at::kInt).to(gpu());
          // What is expected, in float32 on the CPU.
          const auto f32 = [](const at::Tensor& t) { return t.cpu().to(at::kFloat); };
          const auto turned = [&](at::Tensor x, const at::Tensor& norm) {
            if (extras) x = at::rms_norm(x, {d}, std::nullopt, 1e-6) * f32(norm);
            const at::Tensor c = f32(cos)[step], s = f32(sin)[step], x1 = x.narrow(1, 0, d / 2),
                             x2 = x.narrow(1, d / 2, d / 2);
            return at::cat({x1 * c - x2 * s, x2 * c + x1 * s}, 1);
          };
          at::Tensor q = turned(f32(qkv).narrow(0, 0, heads), q_norm);
          if (extras) q = q * f32(scale)[step];
          const at::Tensor k = turned(f32(qkv).narrow(0, heads, kv_heads), k_norm);
          at::Tensor keys = f32(cache)[0].narrow(0, 0, context), values = f32(cache)[1].narrow(0, 0, context);
          keys[context - 1].copy_(k);
          values[context - 1].copy_(f32(qkv).narrow(0, heads + kv_heads, kv_heads));
          const auto repeated = [&, heads = heads, kv_heads = kv_heads](const at::Tensor& x) {
            return x.repeat_interleave(heads / kv_heads, 1).transpose(0, 1);  // [heads, context, d]
          };
          const at::Tensor weights =
              at::softmax(at::matmul(repeated(keys), q.unsqueeze(2)).squeeze(2) / std::sqrt(static_cast<double>(d)), 1);
          const at::Tensor expected = at::matmul(weights.unsqueeze(1), repeated(values)).squeeze(1);

          cuda::DecodeLayer layer = {};
          layer.keys = cache[0].mutable_data_ptr();
          layer.values = cache[1].mutable_data_ptr();
          cuda::Decode op = {};
          op.layers = &layer;
          op.num_layers = 1;
          op.heads = heads;
          op.kv_heads = kv_heads;
          op.head_dim = d;
          const at::Tensor prompts = at::full({1}, context - 1 - step, at::kInt).to(gpu());
          op.batch = 1;
          op.steps = 3;
          op.capacity = static_cast<int32_t>(context) + 5;
          op.prompts = prompts.const_data_ptr<int32_t>();
          op.splits = splits;
          op.eps = 1e-6f;
          op.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
          op.type = cuda_type(type);
          op.float_table = extras;
          op.cos = cos.const_data_ptr();
          op.sin = sin.const_data_ptr();
          if (extras) {
            layer.q_norm = q_norm.const_data_ptr();
            layer.k_norm = k_norm.const_data_ptr();
            op.query_scale = scale.const_data_ptr();
          }
          op.qkv = qkv.mutable_data_ptr();
          op.mixed = mixed.mutable_data_ptr();
          op.partial = partial.mutable_data_ptr<float>();
          op.arrivals = arrivals.mutable_data_ptr<int32_t>();
          op.step = at_step.mutable_data_ptr<int32_t>();
          check_cuda(kernels.attention(op, 0, cuda_stream(qkv)));
          const std::string what = std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " +
                                   std::to_string(d) + ", context " + std::to_string(context) + " in " +
                                   std::to_string(splits) + (extras ? ", with norms" : "");
          check_near(mixed, expected, 2e-2, what);
          EXPECT_SAME(arrivals.cpu(), at::zeros({heads}, at::kInt));
          check_near(cache[0].narrow(0, 0, context), keys, 2e-2, what + ": keys");
          check_near(cache[1].narrow(0, 0, context), values, 1e-6, what + ": values");
        }
      }
    }
  }
}

TEST("attention without rotation: a bias by distance; to what an encoder read") {
  const at::NoGradGuard no_grad;
  const cuda::DecodeKernels& kernels = cuda_kernels(at::empty({1}, at::dtype(at::kHalf).device(gpu())))->decode;
  constexpr int32_t kHeads = 5, kDim = 40, kDistances = 33, kSplits = 7;
  for (const at::ScalarType type : kTypes) {
    for (const int64_t context : {1, 3, 32, 34, 250}) {
      const auto on_gpu = [&](const at::Tensor& t) { return t.to(type).to(gpu()); };
      const auto f32 = [](const at::Tensor& t) { return t.cpu().to(at::kFloat); };
      const at::Tensor qkv = on_gpu(randn({3 * kHeads, kDim}, 1)),
                       cache = on_gpu(randn({2, context + 1, kHeads, kDim}, 2));
      const at::Tensor bias = on_gpu(2 * randn({kHeads, kDistances}, 3)),
                       read = on_gpu(randn({2, 19, kHeads, kDim}, 4));
      const at::Tensor mixed = on_gpu(at::zeros({kHeads, kDim})), step = at::zeros({1}, at::kInt).to(gpu());
      const at::Tensor partial = at::empty({kHeads, kSplits, kDim + 2}, at::kFloat).to(gpu()),
                       arrivals = at::zeros({kHeads}, at::kInt).to(gpu());
      cuda::DecodeLayer layer = {};
      layer.keys = cache[0].mutable_data_ptr();
      layer.values = cache[1].mutable_data_ptr();
      layer.cross_keys = read[0].const_data_ptr();
      layer.cross_values = read[1].const_data_ptr();
      cuda::Decode op = {};
      op.layers = &layer;
      op.num_layers = 1;
      op.heads = op.kv_heads = kHeads;
      op.head_dim = kDim;
      const at::Tensor lengths = at::tensor({context - 1, read.size(1)}, at::kInt).to(gpu());
      op.batch = op.steps = 1;
      op.capacity = static_cast<int32_t>(context) + 1;
      op.prompts = lengths.const_data_ptr<int32_t>();
      op.splits = kSplits;
      op.memory = static_cast<int32_t>(read.size(1));
      op.memories = op.prompts + 1;
      op.scale = 0.25f;
      op.type = cuda_type(type);
      op.distance_bias = bias.const_data_ptr();
      op.distances = kDistances;
      op.qkv = qkv.mutable_data_ptr();
      op.mixed = mixed.mutable_data_ptr();
      op.partial = partial.mutable_data_ptr<float>();
      op.arrivals = arrivals.mutable_data_ptr<int32_t>();
      op.step = step.mutable_data_ptr<int32_t>();
      const auto attended = [&](const at::Tensor& keys, const at::Tensor& values, const at::Tensor& added) {
        const at::Tensor q = f32(qkv).narrow(0, 0, kHeads).unsqueeze(1);  // [heads, 1, d]
        const at::Tensor scores = at::matmul(q, f32(keys).permute({1, 2, 0})).squeeze(1) * 0.25 + added;
        return at::matmul(at::softmax(scores, 1).unsqueeze(1), f32(values).transpose(0, 1)).squeeze(1);
      };
      const std::string what = "context " + std::to_string(context);
      check_cuda(kernels.attention(op, 0, cuda_stream(qkv)));
      EXPECT_SAME(cache[0][context - 1].cpu(), qkv.narrow(0, kHeads, kHeads).cpu());
      EXPECT_SAME(cache[1][context - 1].cpu(), qkv.narrow(0, 2 * kHeads, kHeads).cpu());
      const at::Tensor distance = (context - 1 - at::arange(context)).clamp_max(kDistances - 1);
      check_near(
          mixed,
          attended(cache[0].narrow(0, 0, context), cache[1].narrow(0, 0, context), f32(bias).index_select(1, distance)),
          2e-2, what + ", bias by distance");
      check_cuda(kernels.cross_attention(op, 0, cuda_stream(qkv)));
      check_near(mixed, attended(read[0], read[1], at::zeros({1})), 2e-2, what + ", to what an encoder read");
    }
  }
}

namespace {

DecoderConfig tiny() {
  DecoderConfig config;
  config.vocab_size = 509;
  config.hidden_size = 200;
  config.intermediate_size = 328;
  config.num_layers = 3;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 32;
  return config;
}

DecoderConfig tiny_opt() {
  DecoderConfig config = tiny();
  config.norm = NormType::kLayer;
  config.norm_eps = 1e-5;
  config.num_kv_heads = config.num_heads;
  config.max_positions = 64;
  config.position_offset = 2;
  config.qkv_bias = config.output_bias = config.mlp_bias = true;
  config.plain_mlp = Activation::kRelu;
  return config;
}

T5Config tiny_t5() {
  T5Config config;
  config.vocab_size = 509;
  config.hidden_size = 200;
  config.intermediate_size = 328;
  config.num_layers = 3;
  config.encoder_layers = 2;
  config.num_heads = config.num_kv_heads = 6;
  config.head_dim = 32;
  config.buckets = 8;
  config.max_distance = 24;  // answers are longer
  config.gated_mlp = true;
  config.activation = Activation::kGelu;
  return config;
}

constexpr int64_t kSteps = 40;

template <typename Config>
void check_decoder(const std::string& what, const Config& config, at::ScalarType type,
                   const QuantizationOptions& quantization, std::optional<at::ScalarType> lora = std::nullopt) {
  const at::NoGradGuard no_grad;
  RandomDecoder decoder = random_decoder(config, type, gpu(), quantization);
  if (lora) add_adapters(decoder, 8, *lora);
  const RandomDecoder exact = random_decoder(config, at::kFloat, at::kCPU, {}, &decoder);
  const at::Tensor prompt = at::arange(1, 24, at::kLong);
  Reference reference(decoder, prompt), truth(exact, prompt);
  // Room for 7 steps at first: it grows on the way.
  const auto made = [&](bool graph) {
    return FastDecoder::make(*decoder.model, decoder.head, {{&reference.cache, 23, 23, kSteps}},
                             {.graph = graph, .spare = 7});
  };
  const auto forced = made(true), greedy = made(true), plain = made(false);
  if (forced == nullptr || greedy == nullptr || plain == nullptr)
    return record_failure(__FILE__, __LINE__, what + ": no fast decoder was made");
  // Not greedy in the sampler's eyes, so that each step reads the token that it is given.
  Sampler given({.repetition_penalty = 1 + 1e-9}, {}), highest({}, {});
  const int64_t first = reference.logits.argmax().item<int64_t>();
  int64_t token = first, of_greedy = first, of_plain = first;
  double fast_error = 0, reference_error = 0, apart = 0;  // root mean squares of the steps, and the largest
  for (int64_t i = 0; i < kSteps; ++i) {
    forced->next({token}, {&given});
    const int64_t before = of_greedy;
    of_greedy = greedy->next({of_greedy}, {&highest})[0];
    of_plain = plain->next({before}, {&highest})[0];
    EXPECT_EQ(of_greedy, of_plain);
    reference.next(token);
    truth.next(token);
    const at::Tensor logits = forced->logits()[0];
    fast_error += std::pow(distance(logits, truth.logits), 2) / kSteps;
    reference_error += std::pow(distance(reference.logits, truth.logits), 2) / kSteps;
    apart = std::max(apart, distance(logits, reference.logits));
    token = reference.logits.argmax().item<int64_t>();
  }
  EXPECT_SAME(greedy->logits().cpu(), plain->logits().cpu());
  fast_error = std::sqrt(fast_error);
  reference_error = std::sqrt(reference_error);
  std::printf("  %s: from float32 %.4f (reference %.4f), at most %.4f apart\n", what.c_str(), fast_error,
              reference_error, apart);
  EXPECT(fast_error <= 1.3 * reference_error + 2e-3);
}

}  // namespace

TEST("a whole decoder: 40 steps beside the generator's own path, with a graph and without the same bits") {
  for (const at::ScalarType type : kTypes) {
    for (const auto& [name, quantization] : kStorages) check_decoder(name, tiny(), type, quantization);
    DecoderConfig config = tiny();
    config.qk_norm = true;
    config.qkv_bias = true;
    config.rope_float32 = true;
    check_decoder("norms of q and k, biases, rotation in float32", config, type, {});
    config = tiny();
    config.fused_qkv = true;
    config.head_dim = 40;
    config.hidden_size = 203;
    config.long_context = LongContext{.trained_length = 30, .dynamic_ntk = true, .log_scale = true};
    check_decoder("fused q, k, v, log-n scale, rows of 203", config, type, {});
    for (const auto& [name, quantization] : kStorages) check_decoder("OPT, " + name, tiny_opt(), type, quantization);
  }
  for (const auto& [name, quantization] : kStorages)
    check_decoder("T5, " + name, tiny_t5(), at::kBFloat16, quantization);
  T5Config config = tiny_t5();
  config.gated_mlp = false;
  config.activation = Activation::kRelu;
  config.scaled_output = true;
  check_decoder("T5 with a plain MLP and a scaled output", config, at::kBFloat16, {});
}

TEST("a whole decoder with an adapter on every linear that is not merged, of 16 bits and of float32") {
  for (const at::ScalarType type : kTypes) {
    for (const at::ScalarType lora : {type, at::kFloat}) {
      const std::string with = lora == type ? ", LoRA" : ", LoRA in float32";
      for (const auto& [name, quantization] : kStorages) check_decoder(name + with, tiny(), type, quantization, lora);
      check_decoder("OPT" + with, tiny_opt(), type, {}, lora);
      if (type == at::kBFloat16) check_decoder("T5" + with, tiny_t5(), type, {}, lora);
    }
  }
}

namespace {

// Columns of all products are multiples of 64, where weights are read as words.
DecoderConfig tiny_even() {
  DecoderConfig config = tiny();
  config.hidden_size = config.num_heads * config.head_dim * 4 / 3;  // 256
  config.intermediate_size = 320;
  return config;
}

// Rows of several lengths that leave one after the other: each beside the generator's own path for it alone.
template <typename Config>
void check_rows(const std::string& what, const Config& config, at::ScalarType type,
                const QuantizationOptions& quantization, std::optional<at::ScalarType> lora = std::nullopt) {
  const at::NoGradGuard no_grad;
  constexpr int64_t kRowSteps = 30;
  RandomDecoder decoder = random_decoder(config, type, gpu(), quantization);
  if (lora) add_adapters(decoder, 8, *lora);
  const RandomDecoder exact = random_decoder(config, at::kFloat, at::kCPU, {}, &decoder);
  // Which of the rows that are left go on after a step: 11 rows become 8 (a smaller batch), 7, 4 (smaller), 1
  // (smallest).
  const std::map<int64_t, std::vector<int64_t>> kept = {
      {4, {1, 2, 4, 5, 6, 7, 8, 9}}, {9, {0, 1, 2, 4, 5, 6, 7}}, {12, {0, 3, 5, 6}}, {20, {2}}};
  std::deque<Reference> references, truths;
  std::vector<FastDecoder::Row> rows;
  for (const int64_t length : {23, 5, 17, 1, 9, 23, 2, 13, 20, 3, 7}) {
    const at::Tensor prompt = at::arange(1 + length, 1 + 2 * length, at::kLong);
    references.emplace_back(decoder, prompt);
    truths.emplace_back(exact, prompt);
    rows.push_back({&references.back().cache, length, length, kRowSteps});
  }
  const auto made = [&](bool graph) {
    return FastDecoder::make(*decoder.model, decoder.head, rows, {.graph = graph, .spare = 7});
  };
  const auto forced = made(true), greedy = made(true), plain = made(false);
  if (forced == nullptr || greedy == nullptr || plain == nullptr)
    return record_failure(__FILE__, __LINE__, what + ": no fast decoder was made");
  Sampler given({.repetition_penalty = 1 + 1e-9}, {}), highest({}, {});
  std::vector<size_t> live(references.size());
  std::iota(live.begin(), live.end(), 0);
  std::vector<int64_t> tokens;
  for (const Reference& reference : references) tokens.push_back(reference.logits.argmax().item<int64_t>());
  std::vector<int64_t> of_greedy = tokens;
  double fast_error = 0, reference_error = 0, apart = 0, count = 0, worst = 0;
  size_t worst_row = 0;
  int64_t worst_step = 0;
  for (int64_t i = 0; i < kRowSteps; ++i) {
    forced->next(tokens, std::vector<Sampler*>(live.size(), &given));
    const std::vector<Sampler*> samplers(live.size(), &highest);
    plain->next(of_greedy, samplers);
    of_greedy = greedy->next(of_greedy, samplers);
    // The step that was under way when rows left was one of the larger batch, whose sums are taken in another order:
    // the same tokens but for roundings.
    const at::Tensor beside = plain->logits().cpu().to(at::kFloat);
    for (size_t place = 0; place < live.size(); ++place) {
      const at::Tensor row = beside[static_cast<int64_t>(place)];
      const double highest = row.max().item<double>(), chosen = row[of_greedy[place]].item<double>();
      if (highest - chosen <= 0.05 * std::abs(highest)) continue;
      record_failure(__FILE__, __LINE__,
                     what + ": step " + std::to_string(i) + ", row " + std::to_string(live[place]) + ": token " +
                         std::to_string(of_greedy[place]) + " has logit " + std::to_string(chosen) +
                         ", the highest is " + std::to_string(highest));
    }
    const at::Tensor logits = forced->logits();
    EXPECT_EQ(logits.size(0), static_cast<int64_t>(live.size()));
    for (size_t place = 0; place < live.size(); ++place) {
      Reference &reference = references[live[place]], &truth = truths[live[place]];
      reference.next(tokens[place]);
      truth.next(tokens[place]);
      const at::Tensor own = logits[static_cast<int64_t>(place)];
      const double error = distance(own, truth.logits);
      if (error > worst) {
        worst = error;
        worst_row = live[place];
        worst_step = i;
      }
      fast_error += std::pow(error, 2);
      reference_error += std::pow(distance(reference.logits, truth.logits), 2);
      apart = std::max(apart, distance(own, reference.logits));
      count += 1;
      tokens[place] = reference.logits.argmax().item<int64_t>();
    }
    const auto leaving = kept.find(i);
    if (leaving == kept.end()) continue;
    for (FastDecoder* fast : {forced.get(), greedy.get(), plain.get()}) fast->keep(leaving->second);
    const auto left = [&](auto& of) {
      std::decay_t<decltype(of)> out;
      for (const int64_t place : leaving->second) out.push_back(of[static_cast<size_t>(place)]);
      of = std::move(out);
    };
    left(live);
    left(tokens);
    left(of_greedy);
  }
  fast_error = std::sqrt(fast_error / count);
  reference_error = std::sqrt(reference_error / count);
  std::printf("  %s: from float32 %.4f (reference %.4f; most %.4f, row %zu, step %lld), at most %.4f apart\n",
              what.c_str(), fast_error, reference_error, worst, worst_row, static_cast<long long>(worst_step), apart);
  EXPECT(fast_error <= 1.3 * reference_error + 2e-3);
}

}  // namespace

TEST("several rows at once: each beside the generator's own path for it alone, while rows leave") {
  for (const at::ScalarType type : kTypes) {
    for (const auto& [name, quantization] : kStorages) {
      check_rows("rows, " + name, tiny_even(), type, quantization);
      check_rows("rows, LoRA, " + name, tiny_even(), type, quantization, type);
    }
    check_rows("rows, odd sizes", tiny(), type, {});
    check_rows("rows, OPT", tiny_opt(), type, {});
    DecoderConfig config = tiny_even();
    config.qk_norm = true;
    config.fused_qkv = true;
    config.rope_float32 = true;
    config.long_context = LongContext{.trained_length = 20, .dynamic_ntk = true, .log_scale = true};
    check_rows("rows, norms of q and k, alpha and log-n scale of each row", config, type, {});
  }
  check_rows("rows, T5", tiny_t5(), at::kBFloat16, {});
}

TEST("a decoder of another form is left to the generator's own path") {
  const at::NoGradGuard no_grad;
  const RandomDecoder decoder = random_decoder(tiny_t5(), at::kHalf, gpu());
  Reference reference(decoder, at::arange(1, 5, at::kLong));
  EXPECT(FastDecoder::make(*decoder.model, decoder.head, {{&reference.cache, 4, 4, 3}}, {}) == nullptr);
  RandomDecoder dora = random_decoder(tiny(), at::kHalf, gpu());
  add_adapters(dora, 4, at::kHalf);
  LoraLayer& first = *dora.adapters.front();
  first.magnitude = first.weight_norm = at::ones({first.b.size(0)}, first.b.options());
  Reference of_dora(dora, at::arange(1, 5, at::kLong));
  EXPECT(FastDecoder::make(*dora.model, dora.head, {{&of_dora.cache, 4, 4, 3}}, {}) == nullptr);
}
