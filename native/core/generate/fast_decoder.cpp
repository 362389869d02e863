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
    if (!linear.weight.quantized->describe(out)) return false;
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

int64_t smaller_batch(int64_t batch) {
  int64_t smaller = 1;
  while (smaller * 2 < batch) smaller *= 2;
  return smaller;
}

at::Tensor rows_of(const at::Tensor& x, const at::Tensor& rows, int64_t dim = 0) {
  return x.defined() ? x.index_select(dim, rows) : x;
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
                                               const std::vector<Row>& rows, const Options& options) {
  const cuda::Kernels* kernels = cuda_kernels(head_weight);
  if (kernels == nullptr || rows.empty() || rows.size() > kMaxRows) return nullptr;
  const TextConfig& config = model.config();
  const at::ScalarType dtype = head_weight.scalar_type();
  for (const Row& row : rows) {
    if (row.steps <= 0 || row.cache->length() == 0 || row.cache->stored(0).first.scalar_type() != dtype) return nullptr;
  }
  const at::Tensor& embedding = model.embed_tokens.weight.value;
  const std::optional<DecodeForm> form = model.decode_form(dtype);
  cuda::Norm final_norm;
  if (!form || !describe(*form->final_norm, dtype, final_norm) || !fits(head_weight, dtype) ||
      !fits(embedding, dtype) || config.hidden_size > kMaxHidden || config.head_dim > kMaxHeadDim ||
      config.head_dim % 2 != 0 || config.num_heads % config.num_kv_heads != 0)
    return nullptr;

  std::unique_ptr<FastDecoder> out(new FastDecoder(options, kernels));
  for (const DecodeForm::Layer& layer : form->layers) {
    if (!describe(layer, dtype, out->layers_.emplace_back())) return nullptr;
  }
  const at::TensorOptions like = head_weight.options();
  const c10::DeviceGuard guard(head_weight.device());
  const auto batch = static_cast<int64_t>(rows.size()), heads = config.num_heads, head_dim = config.head_dim;
  for (int64_t i = 0; i < batch; ++i) {
    out->live_.push_back(i);
    out->steps_ = std::max(out->steps_, rows[i].steps);
    out->longest_ = std::max(out->longest_, rows[i].cache->length());
  }
  out->make_tables(model, *form, rows, head_weight);
  out->copy_caches(*form, rows, head_weight);
  out->states_ = at::empty({batch, config.hidden_size}, like);
  out->normed_ = at::empty({batch, config.hidden_size}, like);
  out->qkv_ = at::empty({batch, (heads + 2 * config.num_kv_heads) * head_dim}, like);
  out->mixed_ = at::empty({batch, heads * head_dim}, like);
  out->product_ = at::empty({batch, config.intermediate_size}, like);
  out->logits_ = at::empty({batch, head_weight.size(0)}, like);
  out->token_ = at::zeros({batch}, like.dtype(at::kLong));
  out->step_ = at::zeros({1}, like.dtype(at::kInt));
  if (batch > 1) {
    out->sums_ = at::empty({2 * cuda::kProductBlocks, batch, cuda::kProductRows}, like.dtype(at::kFloat));
    out->arrived_ = at::zeros({cuda::kProductBlocks}, like.dtype(at::kInt));
  }
  out->answers_ =
      at::empty({2, static_cast<int64_t>(kMaxRows)}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
  int64_t rank = 0;
  for (cuda::DecodeLayer& layer : out->layers_) {
    for_each_matrix(layer,
                    [&rank](const cuda::Matrix& matrix, int32_t) { rank = std::max<int64_t>(rank, matrix.lora.rank); });
  }
  out->low_ = at::empty({3, batch, rank}, like.dtype(at::kFloat));
  for (cuda::DecodeLayer& layer : out->layers_) {
    for_each_matrix(layer, [&](cuda::Matrix& matrix, int32_t part) {
      matrix.lora.low = out->low_.mutable_data_ptr<float>() + part * batch * rank;
    });
  }

  cuda::Decode& plan = out->plan_;
  plan.layers = out->layers_.data();
  plan.num_layers = static_cast<int32_t>(config.num_layers);
  plan.hidden = static_cast<int32_t>(config.hidden_size);
  plan.intermediate = static_cast<int32_t>(config.intermediate_size);
  plan.heads = static_cast<int32_t>(heads);
  plan.kv_heads = static_cast<int32_t>(config.num_kv_heads);
  plan.head_dim = static_cast<int32_t>(head_dim);
  plan.eps = static_cast<float>(config.norm_eps);
  plan.type = cuda_type(dtype);
  plan.scale = static_cast<float>(form->attention_scale);
  plan.activation = cuda_activation(form->activation);
  plan.float_table = out->cos_.defined() && out->cos_.scalar_type() == at::kFloat;
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
  return out;
}

void FastDecoder::make_tables(const LanguageModel& model, const DecodeForm& form, const std::vector<Row>& rows,
                              const at::Tensor& like) {
  const auto batch = static_cast<int64_t>(rows.size());
  std::vector<at::Tensor> positions;
  std::vector<LanguageModel::Row> placed;
  for (const Row& row : rows) {
    const int64_t end = row.next_position + row.steps;
    // A row that has ended, but is still computed, stays at its last place.
    positions.push_back(
        at::arange(row.next_position, row.next_position + steps_, like.options().dtype(at::kLong)).clamp_max(end - 1));
    placed.push_back({steps_, end, row.prompt});
  }
  DecoderPass pass;
  model.place(pass, at::cat(positions), placed, like.scalar_type());
  const auto by_row = [&](const at::Tensor& x) { return x.contiguous().view({batch, steps_, -1}); };
  if (pass.rotary.cos.defined()) {
    cos_ = by_row(pass.rotary.cos);
    sin_ = by_row(pass.rotary.sin);
  }
  if (form.learned_positions != nullptr) {
    positions_ =
        by_row(form.learned_positions->weight.value.index_select(0, pass.position_rows).to(like.scalar_type()));
  }
  if (pass.query_scale.defined()) query_scale_ = by_row(pass.query_scale);
}

void FastDecoder::copy_caches(const DecodeForm& form, const std::vector<Row>& rows, const at::Tensor& like) {
  const auto batch = static_cast<int64_t>(rows.size()), layers = static_cast<int64_t>(form.layers.size());
  std::vector<int64_t> lengths, read;
  for (const Row& row : rows) lengths.push_back(row.cache->length());
  const auto to_device = [&](const std::vector<int64_t>& x) {
    return at::tensor(x, at::kLong).to(like.device(), at::kInt);
  };
  prompts_ = to_device(lengths);
  const at::Tensor one = rows[0].cache->stored(0).first;
  // Zeros: what lies beyond a row's length is never read, but may be copied.
  cache_ = at::zeros({layers, 2, batch, longest_, one.size(1), one.size(2)}, like.options());
  const auto copy = [](const at::Tensor& to, const at::Tensor& from) { to.narrow(0, 0, from.size(0)).copy_(from); };
  for (int64_t i = 0; i < layers; ++i) {
    for (int64_t row = 0; row < batch; ++row) {
      const auto [keys, values] = rows[row].cache->stored(i);
      copy(cache_[i][0][row], keys);
      copy(cache_[i][1][row], values);
    }
  }
  if (form.layers[0].cross_norm == nullptr) return;
  for (const Row& row : rows) read.push_back(row.cache->memory(0).k.size(0));
  memories_ = to_device(read);
  const int64_t places = *std::max_element(read.begin(), read.end());
  for (int64_t i = 0; i < layers; ++i) {
    const at::Tensor& of_first = rows[0].cache->memory(i).k;
    const auto joined = [&] { return at::zeros({batch, places, of_first.size(1), of_first.size(2)}, like.options()); };
    const KvCache::Memory& kept = memory_.emplace_back(KvCache::Memory{joined(), joined()});
    for (int64_t row = 0; row < batch; ++row) {
      copy(kept.k[row], rows[row].cache->memory(i).k);
      copy(kept.v[row], rows[row].cache->memory(i).v);
    }
  }
}

FastDecoder::~FastDecoder() { kernels_->decode.release(graph_); }

at::Tensor FastDecoder::logits() const {
  if (static_cast<int64_t>(live_.size()) == logits_.size(0)) return logits_;
  return logits_.index_select(0, at::tensor(live_, at::kLong).to(logits_.device()));
}

void FastDecoder::bind() {
  kernels_->decode.release(graph_);
  graph_ = nullptr;
  const int64_t batch = cache_.size(2);
  const int32_t splits = cuda::splits_for(static_cast<int32_t>(batch), plan_.heads, plan_.kv_heads);
  partial_ = at::empty({batch, plan_.heads, splits, plan_.head_dim + 2}, cache_.options().dtype(at::kFloat));
  arrivals_ = at::zeros({batch, plan_.heads}, cache_.options().dtype(at::kInt));
  plan_.batch = static_cast<int32_t>(batch);
  plan_.steps = static_cast<int32_t>(steps_);
  plan_.capacity = static_cast<int32_t>(cache_.size(3));
  plan_.splits = splits;
  plan_.cos = data_or_null(cos_);
  plan_.sin = data_or_null(sin_);
  plan_.query_scale = data_or_null(query_scale_);
  plan_.positions = data_or_null(positions_);
  plan_.prompts = prompts_.const_data_ptr<int32_t>();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto layer = static_cast<int64_t>(i);
    layers_[i].keys = cache_[layer][0].mutable_data_ptr();
    layers_[i].values = cache_[layer][1].mutable_data_ptr();
    if (memory_.empty()) continue;
    layers_[i].cross_keys = memory_[i].k.const_data_ptr();
    layers_[i].cross_values = memory_[i].v.const_data_ptr();
    plan_.memory = static_cast<int32_t>(memory_[i].k.size(1));
    plan_.memories = memories_.const_data_ptr<int32_t>();
  }
  plan_.states = states_.mutable_data_ptr();
  plan_.normed = normed_.mutable_data_ptr();
  plan_.qkv = qkv_.mutable_data_ptr();
  plan_.mixed = mixed_.mutable_data_ptr();
  plan_.product = product_.mutable_data_ptr();
  plan_.partial = partial_.mutable_data_ptr<float>();
  plan_.sums = sums_.defined() ? sums_.mutable_data_ptr<float>() : nullptr;
  plan_.arrived = arrived_.defined() ? arrived_.mutable_data_ptr<int32_t>() : nullptr;
  plan_.arrivals = arrivals_.mutable_data_ptr<int32_t>();
  plan_.logits = logits_.mutable_data_ptr();
  plan_.token = token_.mutable_data_ptr<int64_t>();
  plan_.step = step_.mutable_data_ptr<int32_t>();
  if (options_.graph) check_cuda(kernels_->decode.capture(plan_, &graph_));
}

void FastDecoder::reserve(int64_t steps) {
  const at::Tensor old = cache_;
  std::vector<int64_t> shape = old.sizes().vec();
  shape[3] = longest_ + steps;
  const int64_t filled = longest_ + begun_;
  cache_ = at::empty(shape, old.options());
  cache_.narrow(3, 0, filled).copy_(old.narrow(3, 0, filled));
  room_ = steps;
  bind();
}

void FastDecoder::keep(const std::vector<int64_t>& rows) {
  std::vector<int64_t> live;
  for (const int64_t row : rows) live.push_back(live_.at(row));
  live_ = std::move(live);
  // Each copy of the caches halves the work, more or less.
  const auto left = static_cast<int64_t>(live_.size()), batch = token_.numel();
  if (left > 0 && left < batch && left <= smaller_batch(batch)) compact();
}

void FastDecoder::compact() {
  const c10::DeviceGuard guard(token_.device());
  // What is under way is done first: its answers are those of the rows as they are now.
  kernels_->decode.release(graph_);
  graph_ = nullptr;
  auto* answers = answers_.mutable_data_ptr<int64_t>();
  for (int64_t slot = 0; slot < 2; ++slot) {
    // live_ ascends: nothing is overwritten that is still to be read.
    for (size_t i = 0; i < live_.size(); ++i) answers[slot * kMaxRows + i] = answers[slot * kMaxRows + live_[i]];
  }
  const at::Tensor rows = at::tensor(live_, at::kLong).to(token_.device());
  cache_ = rows_of(cache_, rows, 2);
  for (at::Tensor* x : {&cos_, &sin_, &query_scale_, &positions_, &prompts_, &memories_, &token_})
    *x = rows_of(*x, rows);
  // The last logits, for who asks for them.
  logits_ = rows_of(logits_, rows);
  for (KvCache::Memory& memory : memory_) memory = {rows_of(memory.k, rows), rows_of(memory.v, rows)};
  for (size_t i = 0; i < live_.size(); ++i) live_[i] = static_cast<int64_t>(i);
  bind();
}

void FastDecoder::set_tokens(const std::vector<int64_t>& tokens) {
  std::vector<int64_t> all(token_.numel());
  for (size_t i = 0; i < tokens.size(); ++i) all[live_[i]] = tokens[i];
  token_.copy_(at::tensor(all, at::kLong));
}

void FastDecoder::begin_step() {
  if (begun_ == room_) reserve(room_ == 0 ? std::min(steps_, options_.spare) : std::min(steps_, room_ * 2));
  if (options_.graph) {
    const auto slot = static_cast<int32_t>(begun_ % 2);
    check_cuda(kernels_->decode.replay(graph_, answers_.mutable_data_ptr<int64_t>() + slot * kMaxRows, slot,
                                       cuda_stream(token_)));
  } else {
    check_cuda(kernels_->decode.step(plan_, cuda_stream(token_)));
  }
  ++begun_;
}

std::vector<int64_t> FastDecoder::next(const std::vector<int64_t>& tokens, const std::vector<Sampler*>& samplers) {
  const c10::DeviceGuard guard(token_.device());
  if (begun_ == 0) {
    ahead_ = options_.graph &&
             std::all_of(samplers.begin(), samplers.end(), [](const Sampler* sampler) { return sampler->is_argmax(); });
  }
  if (!ahead_) {
    set_tokens(tokens);
    begin_step();
    return next_tokens(samplers, logits());
  }
  if (begun_ == 0) {
    set_tokens(tokens);
    begin_step();
  }
  if (begun_ < steps_) begin_step();
  const auto slot = static_cast<int32_t>(read_++ % 2);
  // At once where the graph is newer than the step: nothing was under way when it was made.
  check_cuda(kernels_->decode.wait(graph_, slot));
  std::vector<int64_t> out;
  for (const int64_t row : live_) {
    out.push_back(answers_.const_data_ptr<int64_t>()[slot * kMaxRows + row]);
    if (out.back() < 0) fail_not_finite();
  }
  return out;
}

}  // namespace martlet
