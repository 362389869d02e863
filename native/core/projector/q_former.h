// A small transformer whose learned queries look at the patches of a picture: BERT's post-norm layers, some of them
// with cross-attention. Arithmetic: transformers 5.17, blip_2 (Blip2QFormerModel without text).
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/nn/attention.h"
#include "core/nn/checkpoint.h"
#include "core/nn/linear.h"
#include "core/nn/mlp.h"
#include "core/nn/norm.h"

namespace martlet {

struct QFormerConfig {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t vision_size = 0;
  int64_t cross_attention_frequency = 2;  // every so many layers, from the first on
  double norm_eps = 1e-12;
  Activation activation = Activation::kGelu;
  double dropout = 0, attention_dropout = 0;
};

class QFormer : public Module {
 public:
  explicit QFormer(const QFormerConfig& config);
  ~QFormer() override;
  // queries: [Q, hidden], the same for every picture; patches: [T, vision_size], pictures one after the other as `rows`
  // says → [pictures · Q, hidden]. Computed in the dtype of its weights.
  at::Tensor forward(const at::Tensor& queries, const at::Tensor& patches, const SequenceLengths& rows,
                     const ForwardOptions& options) const;

 private:
  class Attention;
  class Layer;
  QFormerConfig config_;
  LayerNorm layernorm_;
  std::vector<std::unique_ptr<Layer>> layers_;
};

}  // namespace martlet
