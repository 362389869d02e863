// The decoder's layer with frozen weights and LoRA pairs, forward and backward written out: no autograd graph in it,
// one product for linears of one input, norm, sum, rotation and gate in place where kernels do them. It computes what
// DecoderLayer::forward does, which is the reference that it is tested against and takes every other case.
#pragma once

#include <optional>

#include "core/language/decoder.h"
#include "core/lora/linear_stack.h"

namespace martlet {

// x → the layer's output, differentiable. Gradients of the pairs are added to their .grad in the backward pass, as
// those of recomputed layers are. Keeps (all [T, …]) x, q|k|v, the attention's output, the sum after it, and gate|up;
// without gate|up with Recompute::kMlp, nothing but x with kLayer. Norms and the MLP's product are always made again.
// Nothing where the layer or the pass is of another form: no training, a cache, trained or quantised weights, weights
// that are not stacked, DoRA, dropout, LayerNorm, an MLP without gate, positions that are not rotary.
std::optional<at::Tensor> run_frozen_layer(const DecoderLayer& layer, const DecoderConfig& config, const at::Tensor& x,
                                           const DecoderPass& pass);

// Of the layer's linears, so that run_frozen_layer() takes them; after that, and after each change of the pairs,
// refresh_layer_pairs().
void stack_layer_weights(DecoderLayer& layer, PairForm form);
void refresh_layer_pairs(DecoderLayer& layer);

}  // namespace martlet
