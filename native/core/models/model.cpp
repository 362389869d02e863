#include "core/models/model.h"

#include <ATen/ATen.h>

#include <numeric>

namespace martlet {

RowPositions VisionLanguageModel::positions(const std::vector<int64_t>& input_ids, const std::vector<Picture>&,
                                            const std::string&) const {
  std::vector<int64_t> axis(input_ids.size());
  std::iota(axis.begin(), axis.end(), 0);
  return {{axis}, static_cast<int64_t>(axis.size())};
}

bool has_own_head(const TextConfig& text, const ModelInfo& info, const WeightSource& stored) {
  if (!text.tie_word_embeddings) return true;
  const at::Tensor head = stored(info.head_key), embedding = stored(info.embedding_key);
  return head.defined() && embedding.defined() && !at::equal(head, embedding);
}

}  // namespace martlet
