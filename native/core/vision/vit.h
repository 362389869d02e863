// Vit(cfg): the pre-norm vision transformer, over pictures packed as rows of patches. The names of its parts are those
// of the checkpoint (the defaults: transformers' CLIPVisionModel).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/nn/attention.h"
#include "core/nn/checkpoint.h"
#include "core/nn/linear.h"
#include "core/nn/mlp.h"
#include "core/nn/norm.h"
#include "core/nn/rope.h"

namespace martlet {

struct VitNames {
  std::string class_embedding = "embeddings.class_embedding";
  std::string patch_embedding = "embeddings.patch_embedding";
  std::string position_embedding = "embeddings.position_embedding.weight";
  std::string embedding_norm = "pre_layrnorm";  // sic: the checkpoints' spelling
  std::string layers = "encoder.layers";
  std::string norm1 = "layer_norm1", norm2 = "layer_norm2";
  std::string attention = "self_attn", fused_qkv = "qkv", attention_out = "out_proj";
  std::string fc1 = "fc1", fc2 = "fc2";
};

struct VitConfig {
  // Learned positions: none; one row of the table for each place of a picture (all pictures of one size); a square
  // table interpolated to as many rows; or weighted rows of the table for each patch (VitLayout::position_index).
  enum class Positions { kNone, kTable, kInterpolatedTable, kSampledTable };
  // Three linears q_proj, k_proj, v_proj; or one, with rows [q, k, v][heads][d], or [heads][q, k, v][d].
  enum class Qkv { kSeparate, kFused, kFusedByHead };

  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t patch_elements = 0;  // numbers in a flat patch: channels · [temporal ·] size²
  bool patch_bias = false;
  bool class_token = true;
  Positions positions = Positions::kTable;
  int64_t position_rows = 0;
  bool embedding_norm = true;  // after the positions are added
  NormType norm = NormType::kLayer;
  double norm_eps = 1e-5;
  Qkv qkv = Qkv::kSeparate;
  bool gated_mlp = false;  // silu-gated, with biases
  Activation activation = Activation::kQuickGelu;
  // Layers that attend over VitLayout::rows where the others attend within windows. Empty: no windows.
  std::vector<int64_t> full_attention_layers;
  VitNames names;
};

// What a forward pass needs to know of the pictures; made once for all layers.
struct VitLayout {
  SequenceLengths rows;     // a picture or a frame each, class token included
  SequenceLengths windows;  // when the configuration has windows
  std::optional<RotaryTable> rotary;
  at::Tensor position_index;   // [T, taps] int64: rows of the position table
  at::Tensor position_weight;  // [T, taps] float32
};

class VitLayer : public Module {
 public:
  explicit VitLayer(const VitConfig& config);
  at::Tensor forward(const at::Tensor& x, const SequenceLengths& rows, const std::optional<RotaryTable>& rotary,
                     DropoutSource* dropout) const;

 private:
  class Attention : public Module {
   public:
    explicit Attention(const VitConfig& config);
    at::Tensor forward(const at::Tensor& x, const SequenceLengths& rows, const std::optional<RotaryTable>& rotary,
                       DropoutSource* dropout) const;

   private:
    std::vector<std::unique_ptr<Linear>> qkv_;  // one fused, or q, k, v
    Linear out_;
    int64_t num_heads_, head_dim_;
    VitConfig::Qkv layout_;
  };
  Attention attention_;
  std::unique_ptr<FeedForward> mlp_;
  std::unique_ptr<Norm> norm1_, norm2_;
};

class Vit : public Module {
 public:
  explicit Vit(const VitConfig& config);
  // Hidden states after `taps[i]` layers (0 = after the embeddings): [rows.total(), hidden] each, pictures one after
  // the other. `patches`: [T, patch_elements] in the model's dtype. Layers past the last one asked for need not be
  // loaded.
  std::vector<at::Tensor> forward(const at::Tensor& patches, const VitLayout& layout, const std::vector<int64_t>& taps,
                                  const ForwardOptions& options) const;
  const VitConfig& config() const { return config_; }
  // Where pictures have to be: the device and dtype of the weights.
  at::TensorOptions options() const { return patch_embedding_.weight.value.options(); }

 private:
  // A convolution whose stride is its kernel is a product with flat patches. Not a Linear: adapters leave it alone.
  class PatchEmbedding : public Module {
   public:
    explicit PatchEmbedding(const VitConfig& config);
    Parameter weight;
    Parameter bias;
  };
  at::Tensor embed(const at::Tensor& patches, const VitLayout& layout) const;

  VitConfig config_;
  Parameter class_embedding_;
  PatchEmbedding patch_embedding_;
  Parameter position_embedding_;
  std::unique_ptr<Norm> embedding_norm_;
  std::vector<std::unique_ptr<VitLayer>> layers_;
};

}  // namespace martlet
