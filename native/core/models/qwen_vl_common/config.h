// The parts of config.json that the Qwen-VL families write alike. What a file leaves out comes from transformers' class
// defaults.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "core/models/qwen_vl_common/model.h"

namespace martlet::qwen_vl_common {

// The language model's section: `text_config`, or the file's top level where 4.x kept it.
nlohmann::json text_section(const nlohmann::json& config);

// Qwen2 as the language model of Qwen2-VL and Qwen2.5-VL: three-axis positions in chunks, biases on q, k and v.
DecoderConfig qwen2_text(const nlohmann::json& config, const char* model);

// The axis of each of `frequencies` frequencies. In chunks: sections[0] frequencies of time, then of rows, then of
// columns. Interleaved: time, row, column by turns, as long as the row's and the column's sections last.
std::vector<int64_t> chunked_axes(const std::vector<int64_t>& sections, int64_t frequencies);
std::vector<int64_t> interleaved_axes(const std::vector<int64_t>& sections, int64_t frequencies);

// What every tower has: layers, heads, patches of [3, temporal_patch_size, patch_size, patch_size], fused q|k|v, no
// class token; hidden_size and what follows are the family's.
void vision_fields(const nlohmann::json& vision, int64_t default_depth, int64_t default_patch_size, Config& config);
// Sets what depends on the sizes (merger, activations' widths), and refuses sizes that do not fit together.
void finish(const nlohmann::json& config, const char* model_type, int64_t vision_out, Config& out);

}  // namespace martlet::qwen_vl_common
