// MiniCPM-V 2.6 and 4.5: a SigLIP tower over pictures and slices of any size, a resampler, Qwen2 or Qwen3. Arithmetic:
// the checkpoint's own modeling_minicpmv.py, modeling_navit_siglip.py and resampler.py.
#pragma once

#include "core/models/model.h"

namespace martlet {

const Family& minicpm_v_family();

}  // namespace martlet
