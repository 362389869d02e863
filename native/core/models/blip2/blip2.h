// BLIP-2: EVA tower → Q-Former → one linear → OPT or flan-T5. Arithmetic: transformers 5.17,
// models/blip_2/modeling_blip_2.py.
#pragma once

#include "core/models/model.h"

namespace martlet {

const Family& blip2_family();

}  // namespace martlet
