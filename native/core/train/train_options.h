// The arguments of `train.begin` (TrainBeginArgs of lib/native/binding.ts).
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "core/train/trainer.h"

namespace martlet {

TrainOptions parse_train_options(const nlohmann::json& args);

}  // namespace martlet
