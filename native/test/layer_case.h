// One decoder layer with random weights and pairs, run under autograd and written out.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>

#include "check.h"
#include "core/base/rng.h"
#include "core/language/frozen_layer.h"
#include "core/lora/linear_stack.h"

namespace martlet::test {

struct LayerOptions {
  LayerOptions() {
    config.hidden_size = 48;
    config.intermediate_size = 80;
    config.num_layers = 1;
    config.num_heads = 4;
    config.num_kv_heads = 4;
    config.head_dim = 16;
    config.rope_axis = {0, 1, 2, 0, 1, 2, 0, 1};
  }
  DecoderConfig config;
  std::vector<int64_t> lengths = {11, 11};
  bool axes = false;  // positions on three axes
  // By the linears' last names; absent: all.
  std::optional<std::vector<std::string>> targets;
  int64_t rank = 4;
  at::ScalarType dtype = at::kFloat, pair_dtype = at::kFloat;
  at::Device device = at::kCPU;
  bool drawn_on_device = false;  // for large layers; other values
  bool input_grad = true;
  PairForm form = PairForm::kInPlace;
  QuantizationOptions quantization;  // of the linears' weights
};

// Output "y" and gradients: of "x", "q_proj.lora_A", …
using LayerResult = std::map<std::string, at::Tensor>;

inline double cosine(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().to(at::kDouble).flatten(), y = b.cpu().to(at::kDouble).flatten();
  return (x.dot(y) / (x.norm() * y.norm())).item<double>();
}

// ‖a − b‖ / ‖b‖
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = b.cpu().to(at::kDouble);
  return ((x - y).norm() / y.norm()).item<double>();
}

struct LayerCase {
  // `computed`: in place of the options' dtypes, with the same values (rounded to those).
  explicit LayerCase(const LayerOptions& o, std::optional<at::ScalarType> computed = {})
      : options(o), layer(std::make_unique<DecoderLayer>(o.config)) {
    uint64_t seed = 1;
    const auto drawn = [&](at::IntArrayRef shape, double scale, double mean, at::ScalarType dtype) {
      if (o.drawn_on_device)
        return at::empty(shape, at::TensorOptions().dtype(dtype).device(o.device)).normal_(mean, scale);
      return (mean + scale * randn(shape, seed++)).to(dtype).to(computed.value_or(dtype)).to(o.device);
    };
    layer->visit([&](const std::string& path, Module& module) {
      const bool norm = path.find("norm") != std::string::npos;
      for (Parameter* parameter : module.own_parameters()) {
        const double scale =
            norm || parameter->shape.size() == 1 ? 0.1 : 1 / std::sqrt(static_cast<double>(parameter->shape[1]));
        parameter->value = drawn(parameter->shape, scale, norm ? 1 : 0, o.dtype);
      }
      auto* linear = dynamic_cast<Linear*>(&module);
      if (linear == nullptr) return;
      const std::string name = path.substr(path.rfind('.') + 1);
      linears[name] = linear;
      if (o.quantization.enabled()) {
        linear->weight.quantized = quantize(linear->weight.value, o.quantization);
        linear->weight.value.reset();
      }
      if (o.targets && std::find(o.targets->begin(), o.targets->end(), name) == o.targets->end()) return;
      LoraLayer& pair = pairs[name];
      const auto in = static_cast<double>(linear->in_features());
      pair.a = drawn({o.rank, linear->in_features()}, 1 / std::sqrt(in), 0, o.pair_dtype).requires_grad_(true);
      pair.b = drawn({linear->out_features(), o.rank}, 0.3, 0, o.pair_dtype).requires_grad_(true);
      pair.scaling = 1.75;
      linear->lora = &pair;
    });
    stack_layer_weights(*layer, o.form);
    refresh_layer_pairs(*layer);
    rows = SequenceLengths::from_lengths(o.lengths, o.device);
    rows.recurring = true;
    x = drawn({rows.total(), o.config.hidden_size}, 1, 0, o.dtype);
    dy = drawn({rows.total(), o.config.hidden_size}, 1, 0, o.dtype);
    const at::Tensor places = at::arange(rows.total(), at::TensorOptions().dtype(at::kLong).device(o.device));
    const Decoder decoder(o.config);
    decoder.place(pass, o.axes ? at::stack({places, places * 2, places * 3}) : places,
                  {{rows.total(), rows.total(), 0}}, x.scalar_type());
    pass.rows = &rows;
  }

  at::Tensor apply(const at::Tensor& in, bool written_out, Recompute recompute) {
    pass.options.recompute = recompute;
    pass.options.training = training;
    std::optional<at::Tensor> y;
    if (written_out) y = run_frozen_layer(*layer, options.config, in, pass);
    took_written_out = y.has_value();
    if (!y) y = run_layer([this](const at::Tensor& t) { return layer->forward(t, pass, 0); }, in, pass.options);
    return *y;
  }

  LayerResult run(bool written_out, Recompute recompute, bool keep_gradients = false) {
    for (auto& [name, pair] : pairs) {
      if (keep_gradients) continue;
      pair.a.mutable_grad().reset();
      pair.b.mutable_grad().reset();
    }
    DropoutSource source{make_generator(options.device), 1, {}};
    pass.options.dropout = with_dropout_source ? &source : nullptr;
    std::optional<OutputObserver> observer;
    if (observed) observer.emplace([](const Module&, const at::Tensor&) {});
    const at::Tensor in = x.detach().requires_grad_(options.input_grad), y = apply(in, written_out, recompute);
    if (y.requires_grad()) torch::autograd::backward({y}, {dy});
    LayerResult result = {{"y", y.detach()}, {"x", in.grad()}};
    for (const auto& [name, pair] : pairs) {
      result[name + ".lora_A"] = pair.a.grad().clone();
      result[name + ".lora_B"] = pair.b.grad().clone();
    }
    return result;
  }

  LayerOptions options;
  std::unique_ptr<DecoderLayer> layer;
  std::map<std::string, Linear*> linears;
  std::map<std::string, LoraLayer> pairs;
  SequenceLengths rows;
  DecoderPass pass;
  at::Tensor x, dy;
  bool training = true, with_dropout_source = false, observed = false;
  bool took_written_out = false;  // of the last run
};

}  // namespace martlet::test
