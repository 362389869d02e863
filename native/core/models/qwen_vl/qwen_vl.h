// Qwen-VL and Qwen-VL-Chat (2023): an OpenCLIP-like tower without a class token, a resampler of 256 queries, Qwen.
// Arithmetic: the checkpoint's own modeling_qwen.py and visual.py.
#pragma once

#include "core/models/model.h"

namespace martlet {

const Family& qwen_vl_family();

}  // namespace martlet
