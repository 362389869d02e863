// A language model with random weights, prefilled, and its next tokens by the generator's own path.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <map>
#include <memory>
#include <vector>

#include "check.h"
#include "core/generate/fast_decoder.h"
#include "core/language/decoder.h"
#include "core/language/t5.h"
#include "core/nn/matvec.h"

namespace martlet::test {

struct RandomDecoder {
  std::unique_ptr<LanguageModel> model;
  at::Tensor head;  // [vocab, hidden]
  std::vector<std::unique_ptr<LoraLayer>> adapters;
};

// Every linear of the model in one order.
inline std::vector<Linear*> linears_of(const RandomDecoder& decoder) {
  std::vector<Linear*> out;
  decoder.model->visit([&out](const std::string&, Module& module) {
    if (auto* linear = dynamic_cast<Linear*>(&module)) out.push_back(linear);
  });
  return out;
}

// A random pair on every linear, about a quarter as strong as the weight.
inline void add_adapters(RandomDecoder& decoder, int64_t rank, at::ScalarType dtype) {
  for (Linear* linear : linears_of(decoder)) {
    const auto drawn = [&](int64_t rows, int64_t columns) {
      return at::empty({rows, columns}, decoder.head.options().dtype(dtype)).normal_() /
             std::sqrt(static_cast<double>(columns));
    };
    auto pair = std::make_unique<LoraLayer>();
    pair->a = drawn(rank, linear->in_features());
    pair->b = drawn(linear->out_features(), rank);
    pair->scaling = 0.25;
    linear->lora = decoder.adapters.emplace_back(std::move(pair)).get();
  }
}

inline std::unique_ptr<LanguageModel> make_model(const DecoderConfig& config) {
  return std::make_unique<Decoder>(config);
}
inline std::unique_ptr<LanguageModel> make_model(const T5Config& config) { return std::make_unique<T5>(config); }

// Weights are drawn on `device`. With `like` its weights and adapters, in `dtype`.
template <typename Config>
RandomDecoder random_decoder(const Config& config, at::ScalarType dtype, at::Device device,
                             QuantizationOptions quantization = {}, const RandomDecoder* like = nullptr) {
  RandomDecoder out{make_model(config), at::Tensor(), {}};
  std::map<std::string, std::vector<int64_t>> shapes;
  std::map<std::string, at::Tensor> values;
  out.model->visit_parameters([&](const std::string& name, Parameter& parameter) { shapes[name] = parameter.shape; });
  if (like != nullptr)
    like->model->visit_parameters([&](const std::string& name, Parameter& p) { values[name] = p.dense(); });
  LoadOptions options;
  options.dtype = dtype;
  options.device = device;
  options.quantization = quantization;
  std::map<std::string, bool> is_linear;
  out.model->visit([&](const std::string& path, const Module& module) {
    is_linear[path + ".weight"] = dynamic_cast<const Linear*>(&module) != nullptr;
  });
  options.is_quantized = [&](const std::string& name) { return quantization.enabled() && is_linear[name]; };
  const auto drawn = [&](at::IntArrayRef shape) {
    at::Tensor x = at::empty(shape, at::TensorOptions().dtype(dtype).device(device)).normal_();
    if (shape.size() == 1) return x.mul_(0.1).add_(1.0);  // norms and biases
    return x.mul_(1.0 / std::sqrt(static_cast<double>(shape[1])));
  };
  out.model->load(
      [&](const std::string& name) {
        return like != nullptr ? values.at(name).to(device, dtype) : drawn(shapes.at(name));
      },
      options);
  out.head = like != nullptr ? like->head.to(device, dtype) : drawn({config.vocab_size, config.hidden_size});
  if (like != nullptr && !like->adapters.empty()) {
    const std::vector<Linear*> own = linears_of(out), theirs = linears_of(*like);
    for (size_t i = 0; i < own.size(); ++i) {
      auto pair = std::make_unique<LoraLayer>(*theirs[i]->lora);
      pair->a = pair->a.to(device, dtype);
      pair->b = pair->b.to(device, dtype);
      own[i]->lora = out.adapters.emplace_back(std::move(pair)).get();
    }
  }
  return out;
}

// The reference: the generator's own path. An encoder-decoder's prompt is what its encoder reads.
class Reference {
 public:
  Reference(const RandomDecoder& decoder, const at::Tensor& prompt)
      : cache(decoder.model->config().num_layers), decoder_(decoder), prompt_(prompt.numel()) {
    rows_ = SequenceLengths::from_lengths({prompt_}, decoder.head.device());
    start_row_ = SequenceLengths::from_lengths({1}, decoder.head.device());
    logits = run(prompt);
  }
  void next(int64_t token) { logits = run(at::full({1}, token, at::kLong)); }
  KvCache cache;
  at::Tensor logits;

 private:
  at::Tensor run(const at::Tensor& ids) {
    const LanguageModel& model = *decoder_.model;
    const at::Device device = decoder_.head.device();
    DecoderPass pass;
    pass.rows = &rows_;
    pass.caches = {&cache};
    pass.decoder_rows = &start_row_;
    pass.decoder_ids = at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device));
    const int64_t n = ids.numel(), end = cache.length() + n;
    model.place(pass, at::arange(end - n, end, at::TensorOptions().dtype(at::kLong).device(device)),
                {{n, end, prompt_}}, decoder_.head.scalar_type());
    const at::Tensor states = model.forward(model.embed(ids.to(device)), pass);
    return product(model.head_input(states.narrow(0, states.size(0) - 1, 1), {}), decoder_.head, {}).squeeze(0);
  }

  const RandomDecoder& decoder_;
  int64_t prompt_;
  SequenceLengths rows_, start_row_;
};

}  // namespace martlet::test
