// W + scaling · B · A into a new checkpoint, tensor by tensor: while one is merged, those before it are written.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "core/base/job.h"

namespace martlet {

// Arguments and result: MergeArgs and MergeResult of lib/native/binding.ts. Sums are taken in float32 and rounded once
// to the dtype written; maxAbsError is the largest distance of a written element from the float64 sum. Keys keep the
// base checkpoint's spelling.
nlohmann::json merge_adapter_json(const nlohmann::json& args, JobContext& job);

}  // namespace martlet
