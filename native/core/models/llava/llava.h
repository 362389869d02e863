// LLaVA-1.5: CLIP tower → two-layer projector → Llama. Arithmetic: transformers 5.17, models/llava/modeling_llava.py.
#pragma once

#include "core/models/model.h"

namespace martlet {

const Family& llava_family();

}  // namespace martlet
