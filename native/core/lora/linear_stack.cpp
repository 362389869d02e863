#include "core/lora/linear_stack.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "core/base/cuda_kernels.h"
#include "core/base/error.h"

namespace martlet {
namespace {

constexpr PairForm kCudaForm = PairForm::kAugmented;  // 5 % of a 7B layer faster, see docs/performance.md

// Tensor cores want extents of a multiple of 8 numbers, and rows that begin at a multiple of 128 bytes.
constexpr int64_t kExtent = 8, kRowBytes = 128;

int64_t aligned(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t pitch_of(int64_t columns, at::ScalarType dtype) {
  return aligned(columns, kRowBytes / static_cast<int64_t>(c10::elementSize(dtype)));
}

at::Tensor empty_rows(int64_t rows, int64_t columns, int64_t spare, const at::TensorOptions& options) {
  const int64_t pitch = pitch_of(columns + spare, c10::typeMetaToScalarType(options.dtype()));
  // oneDNN's bfloat16 products may read on past a row's end, times zero: what lies there must be finite.
  const at::Tensor all =
      options.device().is_cpu() ? at::zeros({rows, pitch}, options) : at::empty({rows, pitch}, options);
  return all.narrow(1, 0, columns);
}

// The whole memory of what empty_rows() gave, and nothing else: its tail may be written.
bool has_tail(const at::Tensor& x, int64_t spare) {
  const int64_t pitch = pitch_of(x.size(1) + spare, x.scalar_type());
  return x.stride(1) == 1 && x.stride(0) == pitch && x.storage_offset() == 0 &&
         x.storage().nbytes() == static_cast<size_t>(x.size(0) * pitch) * x.element_size();
}

at::Tensor with_tail(const at::Tensor& x, int64_t spare) {
  return x.as_strided({x.size(0), x.size(1) + spare}, x.strides());
}

// The tensors as one, if their rows lie one after the other in one memory, at one distance; else undefined.
at::Tensor joined(const std::vector<at::Tensor>& parts) {
  int64_t rows = 0, place = parts[0].storage_offset();
  const int64_t pitch = parts[0].stride(0);
  for (const at::Tensor& part : parts) {
    if (part.stride(0) != pitch || part.stride(-1) != 1 || !part.storage().is_alias_of(parts[0].storage()) ||
        part.storage_offset() != place)
      return at::Tensor();
    rows += part.size(0);
    place += part.size(0) * pitch;
  }
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  sizes[0] = rows;
  return parts[0].detach().as_strided(sizes, parts[0].strides());
}

// Room beside the weights that the pairs of `linears` need in kAugmented.
struct Room {
  int64_t ranks = 0, columns = 0;  // `columns`: ranks, and a whole extent for the bias
};
// Nothing where they do not fit that form.
std::optional<Room> room_for(const std::vector<const Linear*>& linears) {
  int64_t ranks = 0;
  for (const Linear* linear : linears) {
    const LoraLayer* lora = linear->lora;
    if (lora == nullptr) continue;
    if (lora->magnitude.defined() || lora->dropout > 0 || lora->a.scalar_type() != linear->weight.dtype() ||
        lora->b.scalar_type() != lora->a.scalar_type())
      return std::nullopt;
    ranks += lora->a.size(0);
  }
  if (ranks == 0) return std::nullopt;
  ranks = aligned(ranks, kExtent);
  return Room{ranks, ranks + (linears[0]->bias.value.defined() ? kExtent : 0)};
}

// What stack_weights() made for that room, else undefined. `weight`: the stacked one.
at::Tensor buffer_of(const at::Tensor& weight, const Room& room) {
  const int64_t rows = weight.size(0) + room.ranks,
                pitch = pitch_of(weight.size(1) + room.columns, weight.scalar_type());
  if (weight.stride(0) != pitch || weight.storage_offset() != 0 ||
      weight.storage().nbytes() != static_cast<size_t>(rows * pitch) * weight.element_size())
    return at::Tensor();
  return weight.as_strided({rows, weight.size(1) + room.columns}, weight.strides());
}

// The weights, if all are kept in fp8; else nothing.
std::vector<const Fp8Tensor*> fp8_weights(const std::vector<const Linear*>& linears) {
  std::vector<const Fp8Tensor*> out;
  for (const Linear* linear : linears) {
    const auto* weight = dynamic_cast<const Fp8Tensor*>(linear->weight.quantized.get());
    if (weight == nullptr || linear->weight.value.defined()) return {};
    out.push_back(weight);
  }
  return out;
}

// The weights, if all are kept in 4 or 8 bits and dequantised for their products; else nothing.
std::vector<QuantizedPtr> quantized_weights(const std::vector<const Linear*>& linears) {
  std::vector<QuantizedPtr> out;
  for (const Linear* linear : linears) {
    const QuantizedPtr& weight = linear->weight.quantized;
    if (weight == nullptr || linear->weight.value.defined() || dynamic_cast<const Fp8Tensor*>(weight.get()) != nullptr)
      return {};
    out.push_back(weight);
  }
  return out;
}

// Null unless stack_weights() has joined them.
std::shared_ptr<const Fp8Tensor> joined(const std::vector<const Fp8Tensor*>& parts) {
  std::vector<at::Tensor> codes, scales;
  for (const Fp8Tensor* part : parts) {
    codes.push_back(part->rows().codes);
    scales.push_back(part->rows().scales);
  }
  const Fp8Rows all = {joined(codes), joined(scales)};
  if (!all.codes.defined() || !all.scales.defined()) return nullptr;
  return std::make_shared<Fp8Tensor>(all, parts[0]->units(), parts[0]->dtype());
}

// A, stacked, and s B of all pairs as in a buffer of kAugmented, after the codes of fp8 in their memory.
struct PairsAfterCodes {
  at::Tensor scaled_b, a;  // [Σ out, ranks], [ranks, in]
};
int64_t bytes_with_pairs(int64_t out, int64_t in, int64_t ranks, at::ScalarType dtype) {
  return out * in + (out + in) * ranks * static_cast<int64_t>(c10::elementSize(dtype));
}
// Nothing where there is no such room. `codes`: the stacked ones.
std::optional<PairsAfterCodes> pairs_after(const at::Tensor& codes, int64_t ranks, at::ScalarType dtype) {
  const int64_t out = codes.size(0), in = codes.size(1), size = static_cast<int64_t>(c10::elementSize(dtype));
  if (codes.storage_offset() != 0 ||
      codes.storage().nbytes() != static_cast<size_t>(bytes_with_pairs(out, in, ranks, dtype)))
    return std::nullopt;
  const auto part = [&](int64_t begin, int64_t rows, int64_t columns) {
    return at::empty({0}, codes.options().dtype(dtype)).set_(codes.storage(), begin, {rows, columns}, {columns, 1});
  };
  const int64_t begin = out * in / size;  // extents of fp8 are multiples of 16
  return PairsAfterCodes{part(begin, out, ranks), part(begin + out * ranks, ranks, in)};
}

void stack_fp8_weights(const std::vector<Linear*>& linears, PairForm form) {
  const auto parts = fp8_weights({linears.begin(), linears.end()});
  std::optional<Room> room;
  if (form == PairForm::kAugmented) room = room_for({linears.begin(), linears.end()});
  const int64_t ranks = room ? room->ranks : 0, in = parts[0]->sizes()[1];
  int64_t out = 0;
  for (const Fp8Tensor* part : parts) out += part->sizes()[0];
  const int64_t bytes = bytes_with_pairs(out, in, ranks, parts[0]->dtype());
  if (joined(parts) != nullptr && parts[0]->rows().codes.storage().nbytes() == static_cast<size_t>(bytes)) return;
  std::vector<at::Tensor> codes, scales;
  for (const Fp8Tensor* part : parts) {
    codes.push_back(part->rows().codes.view(at::kByte));
    scales.push_back(part->rows().scales);
  }
  const at::Tensor units = parts[0]->units();
  const at::Tensor memory = at::zeros({bytes}, codes[0].options());
  at::Tensor first = memory.narrow(0, 0, out * in).view({out, in});
  at::cat_out(first, codes);
  const Fp8Rows all = {first.view(parts[0]->rows().codes.scalar_type()), at::cat(scales)};
  int64_t row = 0;
  for (Linear* linear : linears) {
    const int64_t rows = linear->weight.quantized->sizes()[0];
    const Fp8Rows own = {all.codes.narrow(0, row, rows), all.scales.narrow(0, row, rows)};
    linear->weight.quantized = std::make_shared<Fp8Tensor>(own, units, linear->weight.quantized->dtype());
    row += rows;
  }
}

}  // namespace

PairForm pair_form(at::Device device) {
  static const std::optional<PairForm> wanted = []() -> std::optional<PairForm> {
    const char* name = std::getenv("MARTLET_LORA_FORM");
    if (name == nullptr) return std::nullopt;
    if (std::string(name) == "in-place") return PairForm::kInPlace;
    if (std::string(name) == "augmented") return PairForm::kAugmented;
    fail(code::kConfig,
         std::string("MARTLET_LORA_FORM is \"") + name + "\": set it to in-place or augmented, or not at all.");
  }();
  return wanted.value_or(device.is_cuda() ? kCudaForm : PairForm::kInPlace);
}

void stack_weights(const std::vector<Linear*>& linears, PairForm form) {
  const at::NoGradGuard no_grad;
  const bool is_fp8 = !fp8_weights({linears.begin(), linears.end()}).empty(),
             is_quantized = !quantized_weights({linears.begin(), linears.end()}).empty();
  std::vector<at::Tensor> weights, biases;
  for (const Linear* linear : linears) {
    for (const auto& [parameter, parts] : {std::pair(&linear->weight, &weights), std::pair(&linear->bias, &biases)}) {
      const at::Tensor& value = parameter->value;
      if ((is_fp8 || is_quantized) && parts == &weights) continue;
      if (!value.defined()) {
        if (parameter->quantized != nullptr || parts == &weights) return;
        continue;
      }
      if (value.requires_grad() || parameter->replaced) return;
      if (value.device() != linears[0]->weight.device() || value.scalar_type() != linears[0]->weight.dtype()) return;
      parts->push_back(value);
    }
  }
  if (!biases.empty() && biases.size() != linears.size()) return;
  const auto place = [&](Parameter Linear::* member, const at::Tensor& all) {
    int64_t row = 0;
    for (Linear* linear : linears) {
      at::Tensor& value = (linear->*member).value;
      const int64_t rows = value.size(0);
      value = all.narrow(0, row, rows);
      row += rows;
    }
  };
  if (!biases.empty() && !joined(biases).defined()) place(&Linear::bias, at::cat(biases));
  if (is_quantized) return;
  if (is_fp8) return stack_fp8_weights(linears, form);
  std::optional<Room> room;
  if (form == PairForm::kAugmented) room = room_for({linears.begin(), linears.end()});
  if (!room) {
    const at::Tensor all = joined(weights);
    if (!all.defined() || !all.is_contiguous()) place(&Linear::weight, at::cat(weights));
    return;
  }
  int64_t out = 0;
  for (const at::Tensor& part : weights) out += part.size(0);
  const int64_t in = weights[0].size(1);
  const at::Tensor buffer =
      at::zeros({out + room->ranks, pitch_of(in + room->columns, weights[0].scalar_type())}, weights[0].options());
  at::Tensor all = buffer.narrow(0, 0, out).narrow(1, 0, in);
  at::cat_out(all, weights);
  place(&Linear::weight, all);
  // Beside a column of x that is 1; its neighbours are zeros.
  if (!biases.empty()) buffer.narrow(0, 0, out).select(1, in + room->ranks).copy_(at::cat(biases));
}

std::optional<LinearStack> LinearStack::of(const std::vector<const Linear*>& linears, at::ScalarType dtype,
                                           const DropoutSource* dropout, std::optional<PairForm> form) {
  LinearStack stack;
  const std::vector<const Fp8Tensor*> fp8 = fp8_weights(linears);
  stack.quantized_ = quantized_weights(linears);
  std::vector<at::Tensor> weights, biases, a;
  int64_t row = 0, rank = 0;
  for (const Linear* linear : linears) {
    const at::Tensor &weight = linear->weight.value, &bias = linear->bias.value;
    const int64_t rows = linear->out_features();
    if (fp8.empty() && stack.quantized_.empty()) {
      if (!weight.defined() || weight.scalar_type() != dtype || weight.requires_grad()) return std::nullopt;
      weights.push_back(weight);
    } else if (linear->weight.dtype() != dtype) {
      return std::nullopt;
    }
    if (bias.defined()) {
      if (bias.scalar_type() != dtype || bias.requires_grad()) return std::nullopt;
      biases.push_back(bias);
    }
    if (const LoraLayer* lora = linear->lora) {
      if (lora->magnitude.defined() || (dropout != nullptr && lora->dropout > 0) || !lora->a.requires_grad() ||
          !lora->b.requires_grad() || lora->b.scalar_type() != lora->a.scalar_type() ||
          (!a.empty() && a[0].scalar_type() != lora->a.scalar_type()))
        return std::nullopt;
      stack.pairs_.push_back({lora, row, rows, rank});
      rank += lora->a.size(0);
      a.push_back(lora->a.detach());
    }
    row += rows;
  }
  if (!biases.empty() && biases.size() != linears.size()) return std::nullopt;
  if (!fp8.empty()) {
    stack.fp8_ = joined(fp8);
    if (stack.fp8_ == nullptr) return std::nullopt;
  } else if (stack.quantized_.empty()) {
    stack.weight_ = joined(weights);
    if (!stack.weight_.defined()) return std::nullopt;
  }
  if (!biases.empty()) {
    stack.bias_ = joined(biases);
    if (!stack.bias_.defined()) return std::nullopt;
  }
  stack.in_ = linears[0]->in_features();
  stack.out_ = row;
  const at::Device device = linears[0]->weight.device();
  stack.options_ = at::TensorOptions().dtype(dtype).device(device);
  if (a.empty()) return stack;
  const auto room = room_for(linears);
  if (room && stack.fp8_ != nullptr) {
    if (const auto pairs = pairs_after(stack.fp8_->rows().codes, room->ranks, dtype)) {
      stack.ranks_ = room->ranks;
      stack.scaled_b_ = pairs->scaled_b;
      stack.a_ = pairs->a;
      return stack;
    }
  }
  if (room && !stack.quantized_.empty() && form.value_or(pair_form(device)) == PairForm::kAugmented) {
    stack.ranks_ = room->ranks;
    stack.columns_ = room->columns;
    return stack;
  }
  if (room && stack.weight_.defined()) {
    const at::Tensor buffer = buffer_of(stack.weight_, *room);
    if (buffer.defined()) {
      stack.ranks_ = room->ranks;
      stack.columns_ = room->columns;
      stack.bind(buffer);
      return stack;
    }
  }
  stack.a_ = a.size() == 1 ? a[0] : at::cat(a);
  return stack;
}

void LinearStack::bind(const at::Tensor& buffer) {
  buffer_ = buffer;
  weight_ = buffer.narrow(0, 0, out_).narrow(1, 0, in_);
  a_ = buffer.narrow(0, out_, ranks_).narrow(1, 0, in_);
  scaled_b_ = buffer.narrow(0, 0, out_).narrow(1, in_, ranks_);
}

LinearStack LinearStack::dequantized() const {
  LinearStack out = *this;
  out.quantized_.clear();
  if (form() == PairForm::kAugmented) {
    const at::Tensor all = empty_rows(out_ + ranks_, in_ + columns_, 0, options_);
    all.narrow(1, in_, columns_).zero_();
    all.narrow(0, out_, ranks_).zero_();
    if (bias_.defined()) all.narrow(0, 0, out_).select(1, in_ + ranks_).copy_(bias_);
    out.bind(all);
    out.refresh_pairs();
  } else {
    out.weight_ = at::empty({out_, in_}, options_);
  }
  int64_t row = 0;
  for (const QuantizedPtr& part : quantized_) {
    part->dequantize_to(out.weight_.narrow(0, row, part->sizes()[0]));
    row += part->sizes()[0];
  }
  return out;
}

void LinearStack::refresh_pairs() const {
  if (!scaled_b_.defined()) return;
  const at::NoGradGuard no_grad;
  const cuda::Kernels* kernels = cuda_kernels(a_);
  std::vector<cuda::PairCopy> copies;
  for (const Pair& pair : pairs_) {
    const at::Tensor &a = pair.lora->a, &b = pair.lora->b;
    at::Tensor to_a = a_.narrow(0, pair.rank_begin, pair.rank()),
               to_b = scaled_b_.narrow(0, pair.row, pair.rows).narrow(1, pair.rank_begin, pair.rank());
    if (kernels == nullptr || !a.is_contiguous() || !b.is_contiguous()) {
      to_a.copy_(a);
      at::mul_out(to_b, b, at::scalar_tensor(pair.lora->scaling, at::kDouble));
      continue;
    }
    copies.push_back({a.const_data_ptr(), b.const_data_ptr(), to_a.mutable_data_ptr(), to_b.mutable_data_ptr(),
                      a_.stride(0), scaled_b_.stride(0), static_cast<int32_t>(pair.rank()), static_cast<int32_t>(in_),
                      static_cast<int32_t>(pair.rows), static_cast<float>(pair.lora->scaling)});
  }
  for (size_t i = 0; i < copies.size(); i += cuda::kMaxPairs) {
    const auto count = static_cast<int32_t>(std::min<size_t>(cuda::kMaxPairs, copies.size() - i));
    check_cuda(kernels->copy_pairs(&copies[i], count, cuda_type(a_.scalar_type()), cuda_stream(a_)));
  }
}

at::Tensor LinearStack::empty_input(int64_t rows) const {
  if (fp8_ != nullptr) return at::Tensor();
  return columns_ > 0 ? empty_rows(rows, in_, columns_, options_) : at::empty({rows, in_}, options_);
}

at::Tensor LinearStack::empty_output(int64_t rows) const {
  if (fp8_ != nullptr) return at::Tensor();
  return columns_ > 0 ? empty_rows(rows, out_, ranks_, options_) : at::empty({rows, out_}, options_);
}

at::Tensor LinearStack::forward(const at::Tensor& x, at::Tensor& low, at::Tensor y, const Fp8Rows& codes) const {
  if (!quantized_.empty()) return dequantized().forward(x, low, y);
  if (buffer_.defined() && has_tail(x, columns_)) {
    const at::Tensor all = with_tail(x, columns_);
    at::Tensor tail = all.narrow(1, in_, ranks_);
    at::mm_out(tail, x, a_.t());
    if (bias_.defined()) all.narrow(1, in_ + ranks_, columns_ - ranks_).fill_(1);
    low = tail.contiguous();  // x need not be kept for it
    const at::Tensor weights = buffer_.narrow(0, 0, out_).t();
    return y.defined() ? at::mm_out(y, all, weights) : at::mm(all, weights);
  }
  if (fp8_ != nullptr) {
    y = codes.codes.defined() ? fp8_->linear(codes, bias_) : fp8_->linear(x, bias_);
  } else if (!y.defined()) {
    y = at::linear(x, weight_, bias_.defined() ? std::optional(bias_) : std::nullopt);
  } else if (bias_.defined()) {
    at::addmm_out(y, bias_, x, weight_.t());
  } else {
    at::mm_out(y, x, weight_.t());
  }
  if (pairs_.empty()) return y;
  low = at::mm(x.to(a_.scalar_type()), a_.t());
  if (scaled_b_.defined()) return y.addmm_(low, scaled_b_.t());
  for (const Pair& pair : pairs_) {
    at::Tensor part = y.narrow(1, pair.row, pair.rows);
    const at::Tensor h = low.narrow(1, pair.rank_begin, pair.rank()), b = pair.lora->b.detach();
    if (b.scalar_type() == y.scalar_type()) {
      part.addmm_(h, b.t(), 1, pair.lora->scaling);
    } else {
      part.add_(at::mm(h, b.t()), pair.lora->scaling);
    }
  }
  return y;
}

at::Tensor LinearStack::input_gradient(const at::Tensor& dy, const Fp8Rows& codes) const {
  if (fp8_ == nullptr) return at::mm(dy, weight_);
  return codes.codes.defined() ? fp8_->input_gradient(codes) : fp8_->input_gradient(dy);
}

// One kernel for the gradients of B and for dy s B, which it puts into low and into dy's tail if it has one; false
// where there is none.
bool LinearStack::backward_b(const at::Tensor& dy, const at::Tensor& low, bool tailed) const {
  const cuda::Kernels* kernels = cuda_kernels(dy);
  cuda::PairGradients op = {};
  if (kernels == nullptr || pairs_.size() > std::size(op.parts) || low.scalar_type() != dy.scalar_type() ||
      dy.stride(1) != 1)
    return false;
  for (const Pair& pair : pairs_) {
    at::Tensor& grad = pair.lora->b.mutable_grad();
    if (!grad.defined()) grad = at::zeros(pair.lora->b.sizes(), pair.lora->b.options().requires_grad(false));
    if (grad.scalar_type() != dy.scalar_type() || !grad.is_contiguous()) return false;
    op.parts[op.count++] = {static_cast<int32_t>(pair.row),         static_cast<int32_t>(pair.rows),
                            static_cast<int32_t>(pair.rank_begin),  static_cast<int32_t>(pair.rank()),
                            static_cast<float>(pair.lora->scaling), grad.mutable_data_ptr()};
  }
  op.dy = dy.const_data_ptr();
  if (tailed) op.tail = with_tail(dy, ranks_).narrow(1, out_, ranks_).mutable_data_ptr();
  op.rows = dy.size(0);
  op.columns = out_;
  op.dy_pitch = dy.stride(0);
  op.low = low.const_data_ptr();
  op.dlow = low.mutable_data_ptr();
  op.scaled_b = scaled_b_.const_data_ptr();
  op.b_pitch = scaled_b_.stride(0);
  op.ranks = static_cast<int32_t>(ranks_);
  op.type = cuda_type(dy.scalar_type());
  int64_t numbers = 0;
  check_cuda(kernels->pair_gradients_scratch(op, &numbers));
  if (numbers == 0) return false;
  const at::Tensor scratch = at::empty({numbers}, dy.options().dtype(at::kFloat));
  op.partial_tail = scratch.mutable_data_ptr<float>();
  check_cuda(kernels->pair_gradients(op, cuda_stream(dy)));
  return true;
}

at::Tensor LinearStack::backward(const at::Tensor& dy, at::Tensor& low, const Fp8Rows& codes) const {
  if (!quantized_.empty()) return dequantized().backward(dy, low);
  if (pairs_.empty()) return input_gradient(dy, codes);
  const bool tailed = buffer_.defined() && has_tail(dy, ranks_);
  if (scaled_b_.defined() && backward_b(dy, low, tailed)) {
    return tailed ? at::mm(with_tail(dy, ranks_), buffer_.narrow(1, 0, in_))
                  : input_gradient(dy, codes).addmm_(low, a_);
  }
  for (const Pair& pair : pairs_) {
    const at::Tensor part = dy.narrow(1, pair.row, pair.rows).to(low.scalar_type()),
                     h = low.narrow(1, pair.rank_begin, pair.rank());
    if (at::Tensor& grad = pair.lora->b.mutable_grad(); grad.defined()) {
      grad.addmm_(part.t(), h, 1, pair.lora->scaling);
    } else {
      grad = at::mm(part.t(), h).mul_(pair.lora->scaling);
    }
  }
  if (tailed) {
    const at::Tensor all = with_tail(dy, ranks_);
    at::Tensor tail = all.narrow(1, out_, ranks_);
    at::mm_out(tail, dy, scaled_b_);
    low.copy_(tail);  // dy need not be kept for it
    return at::mm(all, buffer_.narrow(1, 0, in_));
  }
  at::Tensor dx = input_gradient(dy, codes);
  if (scaled_b_.defined()) {
    at::mm_out(low, dy, scaled_b_);
    return dx.addmm_(low, a_);
  }
  const at::Tensor dlow = at::empty_like(low);
  for (const Pair& pair : pairs_) {
    at::Tensor dh = dlow.narrow(1, pair.rank_begin, pair.rank());
    at::addmm_out(dh, dh, dy.narrow(1, pair.row, pair.rows).to(low.scalar_type()), pair.lora->b.detach(), /*beta=*/0,
                  /*alpha=*/pair.lora->scaling);
  }
  if (a_.scalar_type() == dx.scalar_type()) {
    dx.addmm_(dlow, a_);
  } else {
    dx.add_(at::mm(dlow, a_));
  }
  low = dlow;
  return dx;
}

void LinearStack::backward_a(const at::Tensor& dlow, const at::Tensor& x) const {
  if (pairs_.empty()) return;
  const at::Tensor x_low = x.to(dlow.scalar_type());
  const at::Tensor da = at::mm(dlow.t(), x_low);  // [Σ r, in]
  const cuda::Kernels* kernels = cuda_kernels(da);
  std::vector<cuda::Sum> sums;
  for (const Pair& pair : pairs_) {
    const at::Tensor part = da.narrow(0, pair.rank_begin, pair.rank());
    at::Tensor& grad = pair.lora->a.mutable_grad();
    if (!grad.defined()) {
      grad = part.clone();
    } else if (kernels != nullptr && grad.is_contiguous() && grad.scalar_type() == da.scalar_type() &&
               sums.size() < static_cast<size_t>(cuda::kMaxPairs)) {
      sums.push_back({grad.mutable_data_ptr(), part.const_data_ptr(), static_cast<int32_t>(part.numel())});
    } else {
      grad.add_(part);
    }
  }
  if (!sums.empty()) {
    check_cuda(kernels->add_sums(sums.data(), static_cast<int32_t>(sums.size()), cuda_type(da.scalar_type()),
                                 cuda_stream(da)));
  }
}

}  // namespace martlet
