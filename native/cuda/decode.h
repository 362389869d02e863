// One decoding step of a decoder (the Llama line, OPT, T5's) for one row or a few, as kernels that a CUDA graph can
// hold: all sizes are fixed, tokens and the step are read from device memory. Reference: the same decoder through
// ATen's operations.
#pragma once

#include <cstdint>

namespace martlet::cuda {

enum class Type : int32_t;
using Status = const char*;

constexpr int32_t kMaxBatch = 16;
// What a product of several rows needs beside: blocks that may share its work, rows of weights that they sum apart.
constexpr int32_t kProductBlocks = 384, kProductRows = 128;
// Of attention: parts of the context, and query heads with the same keys that a block does at once.
constexpr int32_t kMaxSplits = 32, kMaxGroup = 4;

// Blocks that share the query heads of one key.
constexpr int32_t chunks_of(int32_t group) { return (group + kMaxGroup - 1) / kMaxGroup; }

// Parts of the context that keep a large GPU busy: four blocks on each of 132 multiprocessors. With more, the parts are
// added up for nothing.
constexpr int32_t splits_for(int32_t batch, int32_t heads, int32_t kv_heads) {
  const int32_t splits = 528 / (batch * kv_heads * chunks_of(heads / kv_heads));
  return splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits;
}

enum class Storage : int32_t { kDense, kInt8, kNf4 };

// An adapter's pair beside a weight: scaling · B (A x) is added to the product.
struct Lora {
  const void* a;  // [rank, columns]; null: there is none
  const void* b;  // [rows, rank]
  float* low;     // scratch that the caller owns, [batch, rank]: A x. Parts of one product have their own
  float scaling;
  int32_t rank;
  bool is_float;  // A and B are float32, else of 16 bits
};

// A weight [rows, columns] in one of the forms of quant/, its bias and its adapter.
struct Matrix {
  const void* weight;  // 16-bit numbers, or codes (int8; NF4: two a byte, the first in the upper half)
  const void* bias;    // 16-bit [rows], or null
  // int8: float32 [rows], what 127 stands for. NF4: one of each 64 elements, float32, or uint8 where nested_map is
  // given.
  const void* scales;
  const float* nested_map;     // NF4: what each of the 256 codes of a scale stands for
  const float* nested_scales;  // NF4: one of each 256 scales
  float nested_offset;
  int32_t outliers;                // int8: columns whose codes are 0 and whose values are kept in 16 bits
  const int64_t* outlier_columns;  // [outliers]
  const void* outlier_values;      // [rows, outliers]
  int32_t rows, columns;
  Storage storage;
  Lora lora;
};

// 16-bit, of a row's length. Without a bias: RMSNorm. No weight: no norm.
struct Norm {
  const void *weight = nullptr, *bias = nullptr;
};

enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kQuickGelu, kSilu, kRelu };

// What a product reads and where its results go. Weights (codes, scales and their maps) are read ahead: no kernel that
// is still under way may be writing them.
struct Matvec {
  const Matrix* parts = nullptr;  // up to 3, of as many columns each; their rows one after the other
  int32_t count = 0;
  bool gated = false;                         // two parts, gate and up: out = activation(gate · x) · (up · x)
  Activation activation = Activation::kNone;  // of the product, before the residual
  int32_t batch = 1;                          // rows of x and of the results, up to kMaxBatch
  const void* x = nullptr;                    // 16-bit [batch, columns], 16-byte aligned
  Norm norm = {};                             // of x first
  float eps = 0;
  const void* residual = nullptr;  // added to the result, or null; may be `out`
  void* out = nullptr;             // 16-bit [batch, rows]
  void* normed = nullptr;          // scratch of several rows with a norm: 16-bit [batch, columns]
  // Scratch of several rows: [2 kProductBlocks, batch, kProductRows], 16-byte aligned; [kProductBlocks], zeros, which
  // it leaves as zeros.
  float* sums = nullptr;
  int32_t* arrived = nullptr;
};

struct DecodeLayer {
  Matrix qkv[3];  // q, k, v; or one part with all rows
  int32_t qkv_parts;
  Matrix out, up, down;
  Matrix gate;  // no rows: the MLP is not gated
  Norm input_norm, mlp_norm;
  const void *q_norm, *k_norm;  // RMSNorm's weights, [head_dim], or null
  void *keys, *values;          // [batch, capacity, kv_heads, head_dim]
  // Attention to what an encoder read, between the two; keys null: there is none.
  Norm cross_norm;
  Matrix cross_q, cross_out;
  const void *cross_keys, *cross_values;  // [batch, memory, heads, head_dim]
};

struct Decode {
  const DecodeLayer* layers;  // host memory, read while the kernels are enqueued
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim;
  int32_t batch;            // rows
  int32_t steps, capacity;  // of the tables and of the cache
  const int32_t* prompts;   // device, [batch]: positions in the cache before step 0
  int32_t splits;           // parts of the context that attention works on at once, up to kMaxSplits
  int32_t memory;           // places for what an encoder read
  const int32_t* memories;  // device, [batch]: positions that it read
  float eps;
  float scale;  // of the scores
  Activation activation;
  Type type;
  bool float_table;         // cos and sin are float32, else of `type`
  const void *cos, *sin;    // [batch, steps, head_dim / 2], or null: nothing is rotated
  const void* query_scale;  // `type`, [batch, steps]: queries times this, or null
  // Added to the scores of self-attention by the distance of query and key, the last for all that are farther:
  // `type`, [heads, distances], or null.
  const void* distance_bias;
  int32_t distances;
  const void* embedding;  // [vocab, hidden]
  const void* positions;  // [batch, steps, hidden], added to the embedding, or null
  Norm final_norm;
  Matrix head;
  // Device memory that the caller owns. All but the last three are scratch.
  void *states, *normed;  // `type`, [batch, hidden]; normed: where there are several rows
  void *qkv, *mixed,
      *product;       // `type`, [batch, (heads + 2 kv_heads) head_dim], [.., heads head_dim], [.., intermediate]
  float* partial;     // [batch, heads, splits, head_dim + 2]
  int32_t* arrivals;  // [batch, heads], zeros, which attention leaves behind
  float* sums;        // of Matvec, as `arrived`; where there are several rows
  int32_t* arrived;
  void* logits;    // `type`, [batch, vocab]
  int64_t* token;  // [batch]: the last token; then the next one, the argmax: −1 if the logits are not finite
  int32_t* step;   // steps done
};

struct DecodeKernels {
  Status (*matvec)(const Matvec& op, Type type, void* stream);
  // q, k, v of layer `layer` in `qkv`: norm, rotation, and k and v into the cache.
  // Then the attention of each row's query, into `mixed`.
  Status (*attention)(const Decode& op, int32_t layer, void* stream);
  // The attention of the queries in `qkv`, [batch, heads, head_dim], to what the encoder read, into `mixed`.
  Status (*cross_attention)(const Decode& op, int32_t layer, void* stream);
  Status (*step)(const Decode& op, void* stream);
  // `step` as a graph with two events; release() waits for the stream of the last replay.
  Status (*capture)(const Decode& op, void** graph);
  // One step, then the next tokens into `token`, pinned host memory, [batch]; ready once wait(slot) has returned. slot:
  // 0 or 1.
  Status (*replay)(void* graph, int64_t* token, int32_t slot, void* stream);
  Status (*wait)(void* graph, int32_t slot);
  void (*release)(void* graph);
};

}  // namespace martlet::cuda
