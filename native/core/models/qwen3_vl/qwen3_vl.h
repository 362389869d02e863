// Qwen3-VL (dense). Arithmetic: transformers 5.17, models/qwen3_vl/modeling_qwen3_vl.py.
#pragma once

#include "core/models/model.h"

namespace martlet {

const Family& qwen3_vl_family();

}  // namespace martlet
