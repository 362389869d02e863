// T5: an encoder reads the input, a decoder that looks at what it gave writes the answer. Arithmetic:
// transformers 5.17, models/t5/modeling_t5.py; the names are its own.
#pragma once

#include <memory>

#include "core/language/language_model.h"
#include "core/nn/activation.h"
#include "core/nn/norm.h"

namespace martlet {

struct T5Config : TextConfig {
  int64_t buckets = 32;  // of distances, which have a bias each for every head
  int64_t max_distance = 128;
  bool gated_mlp = false;
  Activation activation = Activation::kRelu;
  double dropout = 0;
  bool scaled_output = false;  // by hidden_size^−½ before the head
};

// Buckets of key position − query position, int64 of any shape: half of them (half for each direction where
// `bidirectional`) for a distance each, the others for ranges that widen up to max_distance.
at::Tensor relative_buckets(const at::Tensor& relative, bool bidirectional, int64_t buckets, int64_t max_distance);

class T5 : public LanguageModel {
 public:
  explicit T5(const T5Config& config);
  ~T5() override;

  const T5Config& config() const override { return config_; }
  // Positions are relative: there is nothing to place.
  void place(DecoderPass&, const at::Tensor&, const std::vector<Row>&, at::ScalarType) const override {}
  at::Tensor forward(at::Tensor hidden, const DecoderPass& pass) const override;
  at::Tensor head_input(const at::Tensor& states, const ForwardOptions& options) const override;
  // Not in float16, whose residual is float32 behind a float32 `wo`, and clamped.
  std::optional<DecodeForm> decode_form(at::ScalarType dtype) const override;
  const Module* encoder() const override;

 private:
  class Attention;
  class Layer;
  class Stack;
  T5Config config_;
  std::unique_ptr<Stack> encoder_, decoder_;
};

}  // namespace martlet
