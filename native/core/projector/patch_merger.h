// merge² neighbouring patches side by side in one row, then two linears with gelu. Arithmetic: transformers 5.17,
// qwen2_vl (PatchMerger) and qwen3_vl (Qwen3VLVisionPatchMerger).
#pragma once

#include <memory>
#include <string>

#include "core/nn/mlp.h"
#include "core/nn/norm.h"

namespace martlet {

struct PatchMergerConfig {
  int64_t vision_size = 0;
  int64_t text_size = 0;
  int64_t merge = 2;  // a side
  NormType norm = NormType::kLayer;
  bool norm_after_merge = false;  // the norm is over merge² · vision_size, not over one patch
  std::string norm_name = "ln_q", fc1 = "mlp.0", fc2 = "mlp.2";

  int64_t merged_size() const { return vision_size * merge * merge; }
};

class PatchMerger : public Mlp {
 public:
  explicit PatchMerger(const PatchMergerConfig& config);
  // [T, vision_size] in merge-block order → [T / merge², text_size]
  at::Tensor forward(const at::Tensor& x, DropoutSource* dropout) const override;

 private:
  int64_t merged_size_;
  bool norm_after_merge_;
  std::unique_ptr<Norm> norm_;
};

}  // namespace martlet
