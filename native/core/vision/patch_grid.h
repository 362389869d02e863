// Pictures of any size as sequences of patches: the order of the patches, and what follows from where each one is.
// Merge-block order: the merge × merge neighbours that become one token stand one after the other, blocks row by row,
// frames one after the other. Arithmetic: transformers 5.17, vision_utils.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace martlet {

struct PatchGrid {
  int64_t t = 0, h = 0, w = 0;  // frames (temporal patches), rows, columns
  int64_t patches() const { return t * h * w; }
};

// Of frames [F, C, H, W]. A side that is not a multiple of size · merge is ERR_MARTLET_IMAGE.
PatchGrid patch_grid(const at::Tensor& frames, int64_t size, int64_t temporal, int64_t merge);
// frames → [t · h · w, C · temporal · size²] in merge-block order. A last temporal patch that is not full repeats the
// last frame.
at::Tensor cut_patches(const at::Tensor& frames, int64_t size, int64_t temporal, int64_t merge);

// [n, 3 · size²] → [3, size, n · size]: patches one after the other to the right (MiniCPM-V's processor).
at::Tensor patches_side_by_side(const at::Tensor& patches);

// Row and column of each patch of each frame: [2, T] int64.
at::Tensor patch_coordinates(const std::vector<PatchGrid>& grids, int64_t merge);

// Patches in each frame.
std::vector<int64_t> frame_lengths(const std::vector<PatchGrid>& grids);

// Attention windows of `window` × `window` tokens (merged blocks) in every frame; those at the lower and right edges
// are smaller.
struct WindowOrder {
  std::vector<int64_t> tokens;   // the tokens, window by window
  std::vector<int64_t> lengths;  // patches in each window
};
WindowOrder window_order(const std::vector<PatchGrid>& grids, int64_t merge, int64_t window);

// A learned table of side × side positions, sampled bilinearly at each picture's grid with the corners aligned.
struct SampledTable {
  at::Tensor index;   // [T, 4] int64
  at::Tensor weight;  // [T, 4] float32
};
SampledTable sample_table(const std::vector<PatchGrid>& grids, int64_t merge, int64_t side);

// A learned table of side × side positions, [side², C], at another number of rows (a square too): bicubic, corners not
// aligned, in float32 (Qwen-VL's visual.py). The table itself where it fits.
at::Tensor interpolate_table(const at::Tensor& table, int64_t rows);

// Row of a learned table of side × side positions for each patch of a grid, by where the patch lies between 0 and 1
// (MiniCPM-V's modeling_navit_siglip.py). Fractions are rounded as torch.arange does it on the x86 machines that the
// models were trained on: their bits decide. [h · w] int64.
at::Tensor bucketed_positions(const PatchGrid& grid, int64_t side);

// Sine and cosine of column and row, [h · w, dim]: half the numbers for the column, half for the row. float32.
at::Tensor sincos_positions(const PatchGrid& grid, int64_t dim);

}  // namespace martlet
