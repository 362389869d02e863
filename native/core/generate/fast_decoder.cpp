#include "core/generate/fast_decoder.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "core/base/cuda_kernels.h"
#include "core/base/error.h"

namespace martlet {
namespace {

// What the matrices' kernel takes in its shared memory, and the attention's in its registers.
constexpr int64_t kMaxHidden = 24064, kMaxHeadDim = 256;
// Blocks of the attention kernel that keep a large GPU busy.
constexpr int64_t kAttentionBlocks = 1024, kMaxSplits = 64;

bool fits(const at::Tensor& x, at::ScalarType dtype) {
  return x.defined() && x.is_cuda() && x.scalar_type() == dtype && x.is_contiguous();
}

const void* data_or_null(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

bool describe(const LoraLayer& lora, at::ScalarType dtype, cuda::Lora& out) {
  out.is_float = lora.a.scalar_type() == at::kFloat;
  const at::ScalarType own = out.is_float ? at::kFloat : dtype;
  if (lora.magnitude.defined() || !fits(lora.a, own) || !fits(lora.b, own)) return false;
  out.a = lora.a.const_data_ptr();
  out.b = lora.b.const_data_ptr();
  out.scaling = static_cast<float>(lora.scaling);
  out.rank = static_cast<int32_t>(lora.a.size(0));
  return true;
}

bool describe(const Linear& linear, at::ScalarType dtype, cuda::Matrix& out) {
  out = {};
  if (linear.lora != nullptr && !describe(*linear.lora, dtype, out.lora)) return false;
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

bool describe(const Norm& norm, at::ScalarType dtype, cuda::Norm& out) {
  const auto take = [dtype](const Parameter& parameter, const void*& data) {
    if (!fits(parameter.value, dtype)) return false;
    data = parameter.value.const_data_ptr();
    return true;
  };
  out = {};
  if (const auto* layer = dynamic_cast<const LayerNorm*>(&norm))
    return take(layer->weight, out.weight) && take(layer->bias, out.bias);
  const auto* rms = dynamic_cast<const RmsNorm*>(&norm);
  return rms != nullptr && take(rms->weight, out.weight);
}

bool describe(const DecodeForm::Layer& layer, at::ScalarType dtype, cuda::DecodeLayer& out) {
  out = {};
  out.qkv_parts = static_cast<int32_t>(layer.qkv.size());
  for (size_t i = 0; i < layer.qkv.size(); ++i) {
    if (!describe(*layer.qkv[i], dtype, out.qkv[i])) return false;
  }
  if (layer.q_norm != nullptr) {
    cuda::Norm q, k;
    if (!describe(*layer.q_norm, dtype, q) || !describe(*layer.k_norm, dtype, k)) return false;
    out.q_norm = q.weight;
    out.k_norm = k.weight;
  }
  if (layer.cross_norm != nullptr &&
      (!describe(*layer.cross_norm, dtype, out.cross_norm) || !describe(*layer.cross_q, dtype, out.cross_q) ||
       !describe(*layer.cross_out, dtype, out.cross_out)))
    return false;
  if (layer.gate != nullptr && !describe(*layer.gate, dtype, out.gate)) return false;
  return describe(*layer.input_norm, dtype, out.input_norm) && describe(*layer.out, dtype, out.out) &&
         describe(*layer.mlp_norm, dtype, out.mlp_norm) && describe(*layer.up, dtype, out.up) &&
         describe(*layer.down, dtype, out.down);
}

// Calls fn(matrix, its place among the parts of its product).
template <typename Fn>
void for_each_matrix(cuda::DecodeLayer& layer, Fn&& fn) {
  for (int32_t i = 0; i < layer.qkv_parts; ++i) fn(layer.qkv[i], i);
  for (cuda::Matrix* matrix : {&layer.out, &layer.gate, &layer.down, &layer.cross_q, &layer.cross_out}) fn(*matrix, 0);
  fn(layer.up, 1);
}

cuda::Activation cuda_activation(Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return cuda::Activation::kGelu;
    case Activation::kGeluTanh:
      return cuda::Activation::kGeluTanh;
    case Activation::kQuickGelu:
      return cuda::Activation::kQuickGelu;
    case Activation::kSilu:
      return cuda::Activation::kSilu;
    case Activation::kRelu:
      return cuda::Activation::kRelu;
  }
  fail(code::kInternal, "unreachable activation");
}

}  // namespace

std::unique_ptr<FastDecoder> FastDecoder::make(const LanguageModel& model, const at::Tensor& head_weight,
                                               const KvCache& cache, const Options& options) {
  const cuda::Kernels* kernels = cuda_kernels(head_weight);
  if (kernels == nullptr || options.steps <= 0 || cache.length() == 0) return nullptr;
  const TextConfig& config = model.config();
  const at::ScalarType dtype = head_weight.scalar_type();
  const at::Tensor& embedding = model.embed_tokens.weight.value;
  const std::optional<DecodeForm> form = model.decode_form(dtype);
  cuda::Norm final_norm;
  if (!form || !describe(*form->final_norm, dtype, final_norm) || !fits(head_weight, dtype) ||
      !fits(embedding, dtype) || config.hidden_size > kMaxHidden || config.head_dim > kMaxHeadDim ||
      config.head_dim % 2 != 0 || config.num_heads % config.num_kv_heads != 0 ||
      cache.stored(0).first.scalar_type() != dtype)
    return nullptr;

  std::unique_ptr<FastDecoder> out(new FastDecoder(options, kernels));
  for (const DecodeForm::Layer& layer : form->layers) {
    if (!describe(layer, dtype, out->layers_.emplace_back())) return nullptr;
  }
  const at::TensorOptions like = head_weight.options();
  const c10::DeviceGuard guard(head_weight.device());
  const at::Tensor positions =
      at::arange(options.next_position, options.next_position + options.steps, like.dtype(at::kLong));
  DecoderPass pass;
  model.place(pass, positions, {{options.steps, options.next_position + options.steps, options.prompt}}, dtype);
  if (pass.rotary.cos.defined()) {
    out->cos_ = pass.rotary.cos.contiguous();
    out->sin_ = pass.rotary.sin.contiguous();
  }
  if (form->learned_positions != nullptr) {
    out->positions_ = form->learned_positions->weight.value.index_select(0, pass.position_rows).to(dtype);
  }
  if (pass.query_scale.defined()) out->query_scale_ = pass.query_scale.contiguous();
  const int64_t heads = config.num_heads, head_dim = config.head_dim;
  const int64_t splits = std::clamp<int64_t>(kAttentionBlocks / heads, 1, kMaxSplits);
  out->states_ = at::empty({config.hidden_size}, like);
  out->qkv_ = at::empty({(heads + 2 * config.num_kv_heads) * head_dim}, like);
  out->mixed_ = at::empty({heads * head_dim}, like);
  out->product_ = at::empty({config.intermediate_size}, like);
  int32_t rank = 0;
  for (cuda::DecodeLayer& layer : out->layers_)
    for_each_matrix(layer, [&rank](const cuda::Matrix& matrix, int32_t) { rank = std::max(rank, matrix.lora.rank); });
  out->low_ = at::empty({3, rank}, like.dtype(at::kFloat));
  for (cuda::DecodeLayer& layer : out->layers_) {
    for_each_matrix(layer, [&](cuda::Matrix& matrix, int32_t part) {
      matrix.lora.low = out->low_.mutable_data_ptr<float>() + part * rank;
    });
  }
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
  plan.scale = static_cast<float>(form->attention_scale);
  plan.activation = cuda_activation(form->activation);
  plan.float_table = out->cos_.defined() && out->cos_.scalar_type() == at::kFloat;
  plan.cos = data_or_null(out->cos_);
  plan.sin = data_or_null(out->sin_);
  plan.query_scale = data_or_null(out->query_scale_);
  plan.positions = data_or_null(out->positions_);
  if (form->distance_bias.defined()) {
    out->distance_bias_ = form->distance_bias.to(dtype);
    plan.distance_bias = out->distance_bias_.const_data_ptr();
    plan.distances = static_cast<int32_t>(out->distance_bias_.size(1));
  }
  plan.embedding = embedding.const_data_ptr();
  plan.final_norm = final_norm;
  if (form->head_scale != 1.0) {
    // Of an RMSNorm: its weight bears it.
    out->final_norm_ = static_cast<const RmsNorm&>(*form->final_norm).weight.value * form->head_scale;
    plan.final_norm.weight = out->final_norm_.const_data_ptr();
  }
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
    if (form->layers[i].cross_norm == nullptr) continue;
    const KvCache::Memory& read = cache.memory(i);
    const KvCache::Memory& kept = out->memory_.emplace_back(KvCache::Memory{read.k.contiguous(), read.v.contiguous()});
    out->layers_[i].cross_keys = kept.k.const_data_ptr();
    out->layers_[i].cross_values = kept.v.const_data_ptr();
    plan.memory = static_cast<int32_t>(kept.k.size(0));
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
