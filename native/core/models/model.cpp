#include "core/models/model.h"

#include <numeric>

namespace martlet {

RowPositions VisionLanguageModel::positions(const std::vector<int64_t>& input_ids, const std::vector<Picture>&,
                                            const std::string&) const {
  std::vector<int64_t> axis(input_ids.size());
  std::iota(axis.begin(), axis.end(), 0);
  return {{axis}, static_cast<int64_t>(axis.size())};
}

}  // namespace martlet
