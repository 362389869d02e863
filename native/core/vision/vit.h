// Vit(cfg): the pre-norm vision transformer, over images packed as rows of patches. Names are those of transformers'
// CLIPVisionModel.
#pragma once

#include <memory>
#include <vector>

#include "core/nn/activation.h"
#include "core/nn/attention.h"
#include "core/nn/checkpoint.h"
#include "core/nn/linear.h"
#include "core/nn/norm.h"

namespace martlet {

struct VitConfig {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_channels = 3;
  int64_t image_size = 0;
  int64_t patch_size = 0;
  double norm_eps = 1e-5;
  Activation activation = Activation::kQuickGelu;

  int64_t patches() const { return (image_size / patch_size) * (image_size / patch_size); }
};

class VitEmbeddings : public Module {
 public:
  explicit VitEmbeddings(const VitConfig& config);
  // pixels: [N, 3, image, image] → [N, 1 + patches, hidden]
  at::Tensor forward(const at::Tensor& pixels) const;
  Parameter class_embedding;
  Embedding position_embedding;

 private:
  // A convolution whose stride is its kernel is a product with flat patches: [hidden, 3 · patch · patch].
  class PatchEmbedding : public Module {
   public:
    explicit PatchEmbedding(const VitConfig& config);
    Parameter weight;
  };
  VitConfig config_;
  PatchEmbedding patch_embedding_;
};

class VitLayer : public Module {
 public:
  explicit VitLayer(const VitConfig& config);
  at::Tensor forward(const at::Tensor& x, const SequenceLengths& rows, DropoutSource* dropout) const;

 private:
  class Attention : public Module {
   public:
    explicit Attention(const VitConfig& config);
    at::Tensor forward(const at::Tensor& x, const SequenceLengths& rows, DropoutSource* dropout) const;
    Linear q_proj, k_proj, v_proj, out_proj;
    int64_t num_heads, head_dim;
  };
  class Mlp : public Module {
   public:
    explicit Mlp(const VitConfig& config);
    at::Tensor forward(const at::Tensor& x, DropoutSource* dropout) const;
    Linear fc1, fc2;
    Activation activation;
  };
  Attention self_attn_;
  Mlp mlp_;
  LayerNorm layer_norm1_, layer_norm2_;
};

class Vit : public Module {
 public:
  explicit Vit(const VitConfig& config);
  // Hidden states after `num_layers` layers (0 = after the embeddings' norm): [N · (1 + patches), hidden], images one
  // after the other. `pixels`: [N, 3, image, image] in the model's dtype. Layers past the last one asked for need not
  // be loaded.
  std::vector<at::Tensor> forward(const at::Tensor& pixels, const std::vector<int64_t>& taps,
                                  const ForwardOptions& options) const;
  const VitConfig& config() const { return config_; }

 private:
  // transformers keeps the layers under `encoder`.
  class Encoder : public Module {
   public:
    explicit Encoder(const VitConfig& config);
    std::vector<std::unique_ptr<VitLayer>> layers;
  };
  VitConfig config_;
  VitEmbeddings embeddings_;
  LayerNorm pre_layrnorm_;  // sic: the checkpoint's spelling
  Encoder encoder_;
};

}  // namespace martlet
