// y = x Wᵀ + b, over rows [T, in], with the adapter that is switched on, if any.
#pragma once

#include "core/lora/lora_layer.h"
#include "core/nn/module.h"

namespace martlet {

class Linear : public Module {
 public:
  Linear(int64_t in_features, int64_t out_features, bool bias);

  // x: [T, in] → [T, out]. `dropout` only in training.
  at::Tensor forward(const at::Tensor& x, DropoutSource* dropout = nullptr) const;

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

  Parameter weight;
  Parameter bias;  // no shape when there is none
  // Not owned; null = the base alone.
  const LoraLayer* lora = nullptr;

 private:
  int64_t in_features_;
  int64_t out_features_;
};

class Embedding : public Module {
 public:
  Embedding(int64_t rows, int64_t dim);
  at::Tensor forward(const at::Tensor& ids) const;  // [T] int64 → [T, dim]
  Parameter weight;
};

}  // namespace martlet
