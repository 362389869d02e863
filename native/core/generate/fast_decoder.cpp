#include "core/generate/fast_decoder.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "core/base/cuda_kernels.h"

namespace martlet {
namespace {

// What the matrices' kernel takes in its shared memory, and the attention's in its registers.
constexpr int64_t kMaxHidden = 24064, kMaxHeadDim = 256;
// Blocks of the attention kernel that keep a large GPU busy.
constexpr int64_t kAttentionBlocks = 1024, kMaxSplits = 64;

bool fits(const at::Tensor& x, at::ScalarType dtype) {
  return x.defined() && x.is_cuda() && x.scalar_type() == dtype && x.is_contiguous();
}

bool describe(const Linear& linear, at::ScalarType dtype, cuda::Matrix& out) {
  out = {};
  if (linear.lora != nullptr) return false;
  if (linear.weight.value.defined()) {
    if (!fits(linear.weight.value, dtype)) return false;
    out.weight = linear.weight.value.const_data_ptr();
    out.storage = cuda::Storage::kDense;
  } else {
    if (linear.weight.quantized->dtype() != dtype) return false;
    linear.weight.quantized->describe(out);
  }
  if (linear.bias.value.defined()) {
    if (!fits(linear.bias.value, dtype)) return false;
    out.bias = linear.bias.value.const_data_ptr();
  }
  out.rows = static_cast<int32_t>(linear.out_features());
  out.columns = static_cast<int32_t>(linear.in_features());
  return true;
}

// Null: of another kind, or not there.
const void* weight_of(const Norm* norm, at::ScalarType dtype) {
  const auto* rms = dynamic_cast<const RmsNorm*>(norm);
  return rms != nullptr && fits(rms->weight.value, dtype) ? rms->weight.value.const_data_ptr() : nullptr;
}

bool describe(const DecoderLayer& layer, at::ScalarType dtype, cuda::DecodeLayer& out) {
  out = {};
  const auto* mlp = dynamic_cast<const GatedMlp*>(layer.mlp.get());
  if (mlp == nullptr) return false;
  const DecoderAttention& attention = layer.self_attn;
  out.qkv_parts = static_cast<int32_t>(attention.qkv.size());
  for (size_t i = 0; i < attention.qkv.size(); ++i) {
    if (!describe(*attention.qkv[i], dtype, out.qkv[i])) return false;
  }
  out.input_norm = weight_of(layer.input_layernorm.get(), dtype);
  out.post_attention_norm = weight_of(layer.post_attention_layernorm.get(), dtype);
  if (out.input_norm == nullptr || out.post_attention_norm == nullptr) return false;
  if (attention.q_norm) {
    out.q_norm = weight_of(&*attention.q_norm, dtype);
    out.k_norm = weight_of(&*attention.k_norm, dtype);
    if (out.q_norm == nullptr || out.k_norm == nullptr) return false;
  }
  return describe(attention.o_proj, dtype, out.out) && describe(mlp->gate_proj, dtype, out.gate) &&
         describe(mlp->up_proj, dtype, out.up) && describe(mlp->down_proj, dtype, out.down);
}

}  // namespace

std::unique_ptr<FastDecoder> FastDecoder::make(const LanguageModel& model, const at::Tensor& head_weight,
                                               const KvCache& cache, const Options& options) {
  const auto* decoder = dynamic_cast<const Decoder*>(&model);
  const cuda::Kernels* kernels = cuda_kernels(head_weight);
  if (decoder == nullptr || kernels == nullptr || options.steps <= 0 || cache.length() == 0) return nullptr;
  const DecoderConfig& config = decoder->config();
  const at::ScalarType dtype = head_weight.scalar_type();
  const at::Tensor& embedding = model.embed_tokens.weight.value;
  const void* final_norm = weight_of(decoder->norm.get(), dtype);
  if (config.plain_mlp || config.position_offset || final_norm == nullptr || !fits(head_weight, dtype) ||
      !fits(embedding, dtype) || config.hidden_size > kMaxHidden || config.head_dim > kMaxHeadDim ||
      config.head_dim % 2 != 0 || config.num_heads % config.num_kv_heads != 0 ||
      cache.stored(0).first.scalar_type() != dtype)
    return nullptr;

  std::unique_ptr<FastDecoder> out(new FastDecoder(options, kernels));
  for (const auto& layer : decoder->layers) {
    if (!describe(*layer, dtype, out->layers_.emplace_back())) return nullptr;
  }
  const at::TensorOptions like = head_weight.options();
  const c10::DeviceGuard guard(head_weight.device());
  const at::Tensor positions =
      at::arange(options.next_position, options.next_position + options.steps, like.dtype(at::kLong));
  DecoderPass pass;
  model.place(pass, positions, {{options.steps, options.next_position + options.steps, options.prompt}}, dtype);
  out->cos_ = pass.rotary.cos.contiguous();
  out->sin_ = pass.rotary.sin.contiguous();
  if (pass.query_scale.defined()) out->query_scale_ = pass.query_scale.contiguous();
  const int64_t heads = config.num_heads, head_dim = config.head_dim;
  const int64_t splits = std::clamp<int64_t>(kAttentionBlocks / heads, 1, kMaxSplits);
  out->states_ = at::empty({config.hidden_size}, like);
  out->qkv_ = at::empty({(heads + 2 * config.num_kv_heads) * head_dim}, like);
  out->mixed_ = at::empty({heads * head_dim}, like);
  out->product_ = at::empty({config.intermediate_size}, like);
  out->partial_ = at::empty({heads, splits, head_dim + 2}, like.dtype(at::kFloat));
  out->logits_ = at::empty({head_weight.size(0)}, like);
  out->token_ = at::zeros({1}, like.dtype(at::kLong));
  out->step_ = at::zeros({1}, like.dtype(at::kInt));
  out->answers_ = at::empty({2}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));

  cuda::Decode& plan = out->plan_;
  plan.layers = out->layers_.data();
  plan.num_layers = static_cast<int32_t>(config.num_layers);
  plan.hidden = static_cast<int32_t>(config.hidden_size);
  plan.intermediate = static_cast<int32_t>(config.intermediate_size);
  plan.heads = static_cast<int32_t>(heads);
  plan.kv_heads = static_cast<int32_t>(config.num_kv_heads);
  plan.head_dim = static_cast<int32_t>(head_dim);
  plan.prompt = static_cast<int32_t>(cache.length());
  plan.splits = static_cast<int32_t>(splits);
  plan.eps = static_cast<float>(config.norm_eps);
  plan.type = cuda_type(dtype);
  plan.float_table = out->cos_.scalar_type() == at::kFloat;
  plan.cos = out->cos_.const_data_ptr();
  plan.sin = out->sin_.const_data_ptr();
  plan.query_scale = out->query_scale_.defined() ? out->query_scale_.const_data_ptr() : nullptr;
  plan.embedding = embedding.const_data_ptr();
  plan.final_norm = final_norm;
  plan.head.weight = head_weight.const_data_ptr();
  plan.head.storage = cuda::Storage::kDense;
  plan.head.rows = static_cast<int32_t>(head_weight.size(0));
  plan.head.columns = static_cast<int32_t>(head_weight.size(1));
  plan.states = out->states_.mutable_data_ptr();
  plan.qkv = out->qkv_.mutable_data_ptr();
  plan.mixed = out->mixed_.mutable_data_ptr();
  plan.product = out->product_.mutable_data_ptr();
  plan.partial = out->partial_.mutable_data_ptr<float>();
  plan.logits = out->logits_.mutable_data_ptr();
  plan.token = out->token_.mutable_data_ptr<int64_t>();
  plan.step = out->step_.mutable_data_ptr<int32_t>();

  out->length_ = cache.length();
  out->cache_ = at::empty({config.num_layers, 2, cache.length(), config.num_kv_heads, head_dim}, like);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const auto [keys, values] = cache.stored(i);
    out->cache_[i][0].copy_(keys);
    out->cache_[i][1].copy_(values);
  }
  return out;
}

FastDecoder::~FastDecoder() { kernels_->decode.release(graph_); }

void FastDecoder::reserve(int64_t steps) {
  const at::Tensor old = cache_;
  const int64_t filled = length_ + begun_;
  cache_ = at::empty({old.size(0), 2, length_ + steps, old.size(3), old.size(4)}, old.options());
  cache_.narrow(2, 0, filled).copy_(old.narrow(2, 0, filled));
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto layer = static_cast<int64_t>(i);
    layers_[i].keys = cache_[layer][0].mutable_data_ptr();
    layers_[i].values = cache_[layer][1].mutable_data_ptr();
  }
  room_ = steps;
  // Waits for the step under way, whose answer is then there.
  kernels_->decode.release(graph_);
  graph_ = nullptr;
  if (options_.graph) check_cuda(kernels_->decode.capture(plan_, &graph_));
}

void FastDecoder::begin_step() {
  if (begun_ == room_)
    reserve(room_ == 0 ? std::min(options_.steps, options_.spare) : std::min(options_.steps, room_ * 2));
  if (options_.graph) {
    const auto slot = static_cast<int32_t>(begun_ % 2);
    check_cuda(kernels_->decode.replay(graph_, answers_.mutable_data_ptr<int64_t>() + slot, slot, cuda_stream(token_)));
  } else {
    check_cuda(kernels_->decode.step(plan_, cuda_stream(token_)));
  }
  ++begun_;
}

int64_t FastDecoder::next(int64_t token, Sampler& sampler) {
  const c10::DeviceGuard guard(token_.device());
  if (!sampler.is_argmax() || !options_.graph) {
    token_.fill_(token);
    begin_step();
    return sampler.next(logits_);
  }
  if (begun_ == 0) {
    token_.fill_(token);
    begin_step();
  }
  if (begun_ < options_.steps) begin_step();
  const auto slot = static_cast<int32_t>(read_++ % 2);
  check_cuda(kernels_->decode.wait(graph_, slot));
  const int64_t answer = answers_.const_data_ptr<int64_t>()[slot];
  if (answer < 0) fail_not_finite();
  return answer;
}

}  // namespace martlet
