#include "core/projector/patch_merger.h"

#include <ATen/ATen.h>

namespace martlet {

PatchMerger::PatchMerger(const PatchMergerConfig& c)
    : Mlp({c.merged_size(), c.merged_size(), c.text_size}, Activation::kGelu, /*bias=*/true, c.fc1, c.fc2),
      merged_size_(c.merged_size()),
      norm_after_merge_(c.norm_after_merge),
      norm_(make_norm(c.norm, c.norm_after_merge ? merged_size_ : c.vision_size, 1e-6)) {
  register_module(*norm_, c.norm_name);
}

at::Tensor PatchMerger::forward(const at::Tensor& x, DropoutSource* dropout) const {
  const at::Tensor normed = norm_->forward(norm_after_merge_ ? x.view({-1, merged_size_}) : x);
  return Mlp::forward(normed.view({-1, merged_size_}), dropout);
}

}  // namespace martlet
