// Qwen2.5-VL (dense). Arithmetic: transformers 5.17, models/qwen2_5_vl/modeling_qwen2_5_vl.py.
#pragma once

#include "core/models/model.h"

namespace martlet {

const Family& qwen2_5_vl_family();

}  // namespace martlet
