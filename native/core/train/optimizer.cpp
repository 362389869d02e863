#include "core/train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "core/quant/blockwise.h"

namespace martlet {
namespace {

using Range = FlatParameters::Range;

// Elements of paged state that are on the device at once: two moments of 64 MB.
constexpr int64_t kPage = int64_t{16} << 20;
// As bitsandbytes: blocks of 256, smaller tensors keep float32 moments.
constexpr int64_t kBlock = 256;
constexpr int64_t kMin8bitSize = 4096;

class AdamW : public Optimizer {
 public:
  AdamW(const OptimizerOptions& options, FlatParameters& parameters)
      : Optimizer(options, parameters), paged_(options.paged && !parameters.master().is_cpu()) {
    const at::TensorOptions f32 = parameters.master().options();
    const at::TensorOptions where = paged_ ? f32.device(at::kCPU).pinned_memory(true) : f32;
    exp_avg_ = at::zeros({parameters.size()}, where);
    exp_avg_sq_ = at::zeros({parameters.size()}, where);
    step_ = at::zeros({}, f32);
  }

  NamedTensors state() const override {
    return {{"exp_avg", exp_avg_}, {"exp_avg_sq", exp_avg_sq_}, {"step", step_.view({1})}};
  }

 protected:
  void update(double factor) override {
    step_.add_(1);
    for (const Range& range : parameters_.ranges()) {
      const ParameterGroup& group = parameters_.groups()[range.group];
      for (int64_t begin = range.begin; begin < range.end;) {
        const int64_t length = std::min(range.end - begin, paged_ ? kPage : range.end - begin);
        const auto part = [&](const at::Tensor& flat) { return flat.narrow(0, begin, length); };
        at::Tensor m = part(exp_avg_), v = part(exp_avg_sq_);
        if (paged_) {
          m = m.to(parameters_.master().device(), /*non_blocking=*/true);
          v = v.to(parameters_.master().device(), /*non_blocking=*/true);
        }
        at::_fused_adamw_({part(parameters_.master())}, {part(parameters_.grad())}, {m}, {v}, {}, {step_},
                          group.learning_rate * factor, options_.beta1, options_.beta2, group.weight_decay,
                          options_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
        if (paged_) {
          part(exp_avg_).copy_(m);
          part(exp_avg_sq_).copy_(v);
        }
        begin += length;
      }
    }
  }

 private:
  bool paged_;
  at::Tensor exp_avg_, exp_avg_sq_, step_;
};

class AdamW8bit : public Optimizer {
 public:
  AdamW8bit(const OptimizerOptions& options, FlatParameters& parameters)
      : Optimizer(options, parameters),
        signed_map_(dynamic_map(true, parameters.master().device())),
        unsigned_map_(dynamic_map(false, parameters.master().device())) {
    int64_t coded = 0, blocks = 0, plain = 0;
    for (size_t i = 0; i < parameters.parameters().size(); ++i) {
      const int64_t n = parameters.master_view(i).numel();
      if (n < kMin8bitSize) {
        places_.push_back({plain, n, -1, 0});
        plain += n;
      } else {
        const int64_t count = (n + kBlock - 1) / kBlock;
        places_.push_back({coded, n, blocks, count});
        coded += n;
        blocks += count;
      }
    }
    at::TensorOptions f32 = parameters.master().options();
    if (options.paged && !parameters.master().is_cpu()) f32 = f32.device(at::kCPU).pinned_memory(true);
    const auto byte = f32.dtype(at::kByte);
    for (Moment& moment : moments_) {
      moment.codes = at::empty({coded}, byte);
      moment.absmax = at::zeros({blocks}, f32);
      moment.plain = at::zeros({plain}, f32);
    }
    // The code of 0.
    moments_[0].codes.fill_(signed_map_.eq(0).nonzero()[0].item<int64_t>());
    moments_[1].codes.fill_(unsigned_map_.eq(0).nonzero()[0].item<int64_t>());
    step_ = at::zeros({1}, at::kFloat);
  }

  NamedTensors state() const override {
    NamedTensors out = {{"step", step_}};
    for (int m = 0; m < 2; ++m) {
      const std::string name = m == 0 ? "exp_avg" : "exp_avg_sq";
      out.emplace_back(name + ".codes", moments_[m].codes);
      out.emplace_back(name + ".absmax", moments_[m].absmax);
      out.emplace_back(name + ".plain", moments_[m].plain);
    }
    return out;
  }

 protected:
  void update(double factor) override {
    step_.add_(1);
    const double step = step_.item<double>();
    const double correction1 = 1 - std::pow(options_.beta1, step);
    const double correction2 = std::sqrt(1 - std::pow(options_.beta2, step));
    for (size_t i = 0; i < places_.size(); ++i) {
      const ParameterGroup& group = parameters_.groups()[parameters_.parameters()[i].group];
      const double rate = group.learning_rate * factor;
      at::Tensor p = parameters_.master_view(i).view(-1);
      const at::Tensor g = parameters_.grad_view(i).view(-1);
      at::Tensor m = read(0, i), v = read(1, i);
      m.mul_(options_.beta1).add_(g, 1 - options_.beta1);
      v.mul_(options_.beta2).addcmul_(g, g, 1 - options_.beta2);
      if (group.weight_decay > 0) p.mul_(1 - rate * group.weight_decay);
      p.addcdiv_(m, (v.sqrt() / correction2).add_(options_.epsilon), -rate / correction1);
      write(0, i, m);
      write(1, i, v);
    }
  }

 private:
  struct Moment {
    at::Tensor codes, absmax, plain;
  };
  struct Place {
    int64_t offset, length;  // in codes, or in plain
    int64_t block, blocks;   // block −1 = plain
  };

  at::Tensor read(int which, size_t i) const {
    const Place& place = places_[i];
    const Moment& moment = moments_[which];
    const at::Device device = parameters_.master().device();
    if (place.block < 0) return moment.plain.narrow(0, place.offset, place.length).to(device);
    return dequantize_blockwise(moment.codes.narrow(0, place.offset, place.length).to(device),
                                moment.absmax.narrow(0, place.block, place.blocks).to(device),
                                which == 0 ? signed_map_ : unsigned_map_, kBlock);
  }

  void write(int which, size_t i, const at::Tensor& values) {
    const Place& place = places_[i];
    Moment& moment = moments_[which];
    if (place.block < 0) {
      moment.plain.narrow(0, place.offset, place.length).copy_(values);
      return;
    }
    const BlockwiseCodes coded = quantize_blockwise(values, which == 0 ? signed_map_ : unsigned_map_, kBlock);
    moment.codes.narrow(0, place.offset, place.length).copy_(coded.codes);
    moment.absmax.narrow(0, place.block, place.blocks).copy_(coded.absmax);
  }

  at::Tensor signed_map_, unsigned_map_, step_;
  std::vector<Place> places_;
  Moment moments_[2];
};

class Sgd : public Optimizer {
 public:
  Sgd(const OptimizerOptions& options, FlatParameters& parameters) : Optimizer(options, parameters) {
    if (options.momentum > 0) buffer_ = at::zeros_like(parameters.master());
    step_ = at::zeros({1}, at::kFloat);
  }

  NamedTensors state() const override {
    NamedTensors out = {{"step", step_}};
    if (buffer_.defined()) out.emplace_back("momentum_buffer", buffer_);
    return out;
  }

 protected:
  void update(double factor) override {
    const bool first = step_.item<double>() == 0;
    step_.add_(1);
    for (const Range& range : parameters_.ranges()) {
      const ParameterGroup& group = parameters_.groups()[range.group];
      const auto part = [&](const at::Tensor& flat) { return flat.narrow(0, range.begin, range.end - range.begin); };
      at::Tensor p = part(parameters_.master());
      at::Tensor direction = part(parameters_.grad()).add(p, group.weight_decay);
      if (buffer_.defined()) {
        at::Tensor buffer = part(buffer_);
        if (first) {
          buffer.copy_(direction);
        } else {
          buffer.mul_(options_.momentum).add_(direction);
        }
        direction = options_.nesterov ? direction.add_(buffer, options_.momentum) : buffer;
      }
      p.add_(direction, -group.learning_rate * factor);
    }
  }

 private:
  at::Tensor buffer_, step_;
};

// Shazeer & Stern 2018, in the form that transformers' Trainer uses.
class Adafactor : public Optimizer {
 public:
  Adafactor(const OptimizerOptions& options, FlatParameters& parameters) : Optimizer(options, parameters) {
    int64_t rows = 0, columns = 0, plain = 0;
    for (size_t i = 0; i < parameters.parameters().size(); ++i) {
      const at::Tensor p = parameters.master_view(i);
      places_.push_back({rows, columns, plain});
      if (p.dim() == 2) {
        rows += p.size(0);
        columns += p.size(1);
      } else {
        plain += p.numel();
      }
    }
    const at::TensorOptions f32 = parameters.master().options();
    rows_ = at::zeros({rows}, f32);
    columns_ = at::zeros({columns}, f32);
    plain_ = at::zeros({plain}, f32);
    step_ = at::zeros({1}, at::kFloat);
  }

  NamedTensors state() const override {
    return {{"exp_avg_sq_row", rows_}, {"exp_avg_sq_col", columns_}, {"exp_avg_sq", plain_}, {"step", step_}};
  }

 protected:
  void update(double factor) override {
    constexpr double kEpsilon = 1e-30, kClip = 1.0, kDecayRate = -0.8;
    step_.add_(1);
    const double beta2 = 1 - std::pow(step_.item<double>(), kDecayRate);
    const auto rms = [](const at::Tensor& x) { return x.norm() / std::sqrt(static_cast<double>(x.numel())); };
    for (size_t i = 0; i < places_.size(); ++i) {
      const ParameterGroup& group = parameters_.groups()[parameters_.parameters()[i].group];
      const double rate = group.learning_rate * factor;
      at::Tensor p = parameters_.master_view(i);
      const at::Tensor g = parameters_.grad_view(i);
      at::Tensor update = g.square().add_(kEpsilon);
      if (p.dim() == 2) {
        at::Tensor row = rows_.narrow(0, places_[i].row, p.size(0));
        at::Tensor column = columns_.narrow(0, places_[i].column, p.size(1));
        row.mul_(beta2).add_(update.mean(1), 1 - beta2);
        column.mul_(beta2).add_(update.mean(0), 1 - beta2);
        update = (row / row.mean()).rsqrt_().unsqueeze(1) * column.rsqrt().unsqueeze(0);
      } else {
        at::Tensor average = plain_.narrow(0, places_[i].plain, p.numel()).view(p.sizes());
        average.mul_(beta2).add_(update, 1 - beta2);
        update = average.rsqrt();
      }
      update.mul_(g);
      update.div_((rms(update) / kClip).clamp_min_(1.0)).mul_(rate);
      if (group.weight_decay > 0) p.mul_(1 - group.weight_decay * rate);
      p.sub_(update);
    }
  }

 private:
  struct Place {
    int64_t row, column, plain;
  };
  std::vector<Place> places_;
  at::Tensor rows_, columns_, plain_, step_;
};

}  // namespace

void Optimizer::step(double factor) {
  const at::NoGradGuard no_grad;
  update(factor);
  parameters_.refresh_compute();
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options, FlatParameters& parameters) {
  switch (options.type) {
    case OptimizerOptions::Type::kAdamW8bit:
      return std::make_unique<AdamW8bit>(options, parameters);
    case OptimizerOptions::Type::kSgd:
      return std::make_unique<Sgd>(options, parameters);
    case OptimizerOptions::Type::kAdafactor:
      return std::make_unique<Adafactor>(options, parameters);
    default:
      return std::make_unique<AdamW>(options, parameters);
  }
}

}  // namespace martlet
