#include "core/language/t5.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <map>
#include <optional>

namespace martlet {

at::Tensor relative_buckets(const at::Tensor& relative, bool bidirectional, int64_t buckets, int64_t max_distance) {
  at::Tensor side = at::zeros_like(relative), distance;
  if (bidirectional) {
    buckets /= 2;
    side = relative.gt(0).to(at::kLong) * buckets;
    distance = relative.abs();
  } else {
    distance = relative.clamp_max(0).neg();
  }
  const int64_t exact = buckets / 2;
  // In float32, which decides where a range begins.
  const double range = std::log(static_cast<double>(max_distance) / static_cast<double>(exact));
  const at::Tensor wide = exact + ((distance.to(at::kFloat) / exact).log() / range * (buckets - exact)).to(at::kLong);
  return side + at::where(distance < exact, distance, wide.clamp_max(buckets - 1));
}

namespace {

enum Place : int64_t { kSelf, kCross, kFeedForward, kProduct, kEmbedding, kEnd, kWeights };  // kWeights + kSelf/kCross

// Normalised, in the dtype that the linears compute in: behind a float32 `wo` the residual is float32.
at::Tensor normed(const RmsNorm& norm, const at::Tensor& x) {
  const at::ScalarType dtype = norm.weight.value.scalar_type();
  return x.scalar_type() == dtype ? run_norm(norm, x) : norm.forward(x).to(dtype);
}

// float16 overflows in the larger models: the residual is kept finite.
at::Tensor clamped(const at::Tensor& x) {
  if (x.scalar_type() != at::kHalf) return x;
  constexpr double kLargest = 65504;
  const at::Tensor limit = at::where(x.isinf().any(), kLargest - 1000, kLargest).to(x.scalar_type());
  return at::clamp(x, limit.neg(), limit);
}

using Lengths = std::pair<int64_t, int64_t>;  // of a row's queries and keys

// What one pass of a stack shares; copies of it outlive the backward pass.
struct StackPass {
  SequenceLengths rows, memory_rows;
  RowCaches caches;
  ForwardOptions options;
  // By lengths: buckets, and the bias where it is not trained.
  std::shared_ptr<std::map<Lengths, at::Tensor>> buckets = std::make_shared<std::map<Lengths, at::Tensor>>(),
                                                 biases = std::make_shared<std::map<Lengths, at::Tensor>>();
};

}  // namespace

class T5::Attention : public Module {
 public:
  explicit Attention(const T5Config& c)
      : q(c.hidden_size, c.num_heads * c.head_dim, false),
        k(c.hidden_size, c.num_heads * c.head_dim, false),
        v(c.hidden_size, c.num_heads * c.head_dim, false),
        o(c.num_heads * c.head_dim, c.hidden_size, false),
        head_dim_(c.head_dim) {
    register_module(q, "q");
    register_module(k, "k");
    register_module(v, "v");
    register_module(o, "o");
  }
  at::Tensor heads(const Linear& linear, const at::Tensor& x, DropoutSource* dropout) const {
    return linear.forward(x, dropout).view({x.size(0), -1, head_dim_});
  }
  at::Tensor out(const at::Tensor& mixed, DropoutSource* dropout) const {
    return o.forward(mixed.reshape({mixed.size(0), -1}), dropout);
  }
  Linear q, k, v, o;

 private:
  int64_t head_dim_;
};

// A stack's layer: self-attention, cross-attention in a decoder, feed-forward part, each with its norm before it.
class T5::Layer : public Module {
 public:
  Layer(const T5Config& c, ModelDropout::Stack stack, int64_t index)
      : stack_(stack),
        index_(index),
        rate_(c.dropout),
        activation_(c.activation),
        self_(c),
        self_norm_(c.hidden_size, c.norm_eps),
        wi_(c.hidden_size, c.intermediate_size, false),
        wo_(c.intermediate_size, c.hidden_size, false),
        norm_(c.hidden_size, c.norm_eps) {
    register_module(self_, "layer.0.SelfAttention");
    register_module(self_norm_, "layer.0.layer_norm");
    if (stack == ModelDropout::kDecoder) {
      register_module(cross_.emplace(c), "layer.1.EncDecAttention");
      register_module(cross_norm_.emplace(c.hidden_size, c.norm_eps), "layer.1.layer_norm");
    }
    const std::string last = cross_ ? "layer.2" : "layer.1";
    if (c.gated_mlp) {
      register_module(wi_, last + ".DenseReluDense.wi_0");
      register_module(gated_.emplace(c.hidden_size, c.intermediate_size, false), last + ".DenseReluDense.wi_1");
    } else {
      register_module(wi_, last + ".DenseReluDense.wi");
    }
    register_module(wo_, last + ".DenseReluDense.wo");
    register_module(norm_, last + ".layer_norm");
  }

  // `bias`: of self-attention. memory: what the encoder gave; undefined in an encoder, and once it is in the cache.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& memory, const StackPass& pass,
                     const std::function<at::Tensor(int64_t, int64_t)>& bias) const {
    DropoutSource* source = pass.options.dropout;
    at::Tensor h = clamped(x + dropped(self_attention(normed(self_norm_, x), pass, bias), kSelf, source));
    if (cross_) h = clamped(h + dropped(cross_attention(normed(*cross_norm_, h), memory, pass), kCross, source));
    return run_mlp(
        [this, source](const at::Tensor& y) {
          return clamped(y + dropped(feed_forward(normed(norm_, y), source), kFeedForward, source));
        },
        h, pass.options);
  }

  DecodeForm::Layer decode_form() const {
    DecodeForm::Layer form;
    form.input_norm = &self_norm_;
    form.qkv = {&self_.q, &self_.k, &self_.v};
    form.out = &self_.o;
    form.cross_norm = &*cross_norm_;
    form.cross_q = &cross_->q;
    form.cross_out = &cross_->o;
    form.mlp_norm = &norm_;
    form.gate = gated_ ? &wi_ : nullptr;
    form.up = gated_ ? &*gated_ : &wi_;
    form.down = &wo_;
    return form;
  }

 private:
  ModelDropout dropout(int64_t place) const { return {rate_, stack_, index_, place}; }
  at::Tensor dropped(const at::Tensor& x, Place place, const DropoutSource* source) const {
    return dropout(place).forward(x, source);
  }
  // T5 does not scale: its initial weights do.
  AttentionExtras extras(Place place, const DropoutSource* source) const {
    AttentionExtras out;
    out.scale = 1.0;
    out.dropout = dropout(kWeights + place);
    out.source = source;
    return out;
  }

  at::Tensor self_attention(const at::Tensor& x, const StackPass& pass,
                            const std::function<at::Tensor(int64_t, int64_t)>& bias) const {
    DropoutSource* source = pass.options.dropout;
    const at::Tensor q = self_.heads(self_.q, x, source), k = self_.heads(self_.k, x, source),
                     v = self_.heads(self_.v, x, source);
    AttentionExtras with = extras(kSelf, source);
    with.bias = bias;
    if (decodes(pass.caches)) return self_.out(decode_attention(pass.caches, index_, q, k, v, with), source);
    append_prompts(pass.caches, index_, k, v, pass.rows);
    const bool causal = stack_ == ModelDropout::kDecoder;
    return self_.out(packed_attention(q, k, v, pass.rows, causal, with), source);
  }

  at::Tensor cross_attention(const at::Tensor& x, const at::Tensor& memory, const StackPass& pass) const {
    DropoutSource* source = pass.options.dropout;
    const at::Tensor q = cross_->heads(cross_->q, x, source);
    const AttentionExtras with = extras(kCross, source);
    if (!memory.defined()) return cross_->out(decode_cross_attention(pass.caches, index_, q, with), source);
    const KvCache::Memory read = {cross_->heads(cross_->k, memory, source), cross_->heads(cross_->v, memory, source)};
    keep_memory(pass.caches, index_, read, pass.memory_rows);
    return cross_->out(packed_attention(q, read.k, read.v, pass.rows, pass.memory_rows, /*causal=*/false, with),
                       source);
  }

  at::Tensor feed_forward(const at::Tensor& x, DropoutSource* source) const {
    std::vector<at::Tensor> inputs = {wi_.forward(x, source)};
    if (gated_) inputs.push_back(gated_->forward(x, source));
    const at::Tensor product = run_cheap(
        [act = activation_](const std::vector<at::Tensor>& in) {
          const at::Tensor y = activate(in[0], act);
          return in.size() > 1 ? y * in[1] : y;
        },
        inputs);
    return wo_.forward(dropped(product, kProduct, source).to(wo_.weight.dtype()), source);
  }

  ModelDropout::Stack stack_;
  int64_t index_;
  double rate_;
  Activation activation_;
  Attention self_;
  RmsNorm self_norm_;
  std::optional<Attention> cross_;
  std::optional<RmsNorm> cross_norm_;
  Linear wi_, wo_;
  std::optional<Linear> gated_;
  RmsNorm norm_;
};

class T5::Stack : public Module {
 public:
  Stack(const T5Config& c, ModelDropout::Stack stack, int64_t layers)
      : config_(c),
        stack_(stack),
        final_layer_norm_(c.hidden_size, c.norm_eps),
        relative_attention_bias_(c.buckets, c.num_heads) {
    for (int64_t i = 0; i < layers; ++i) {
      layers_.push_back(std::make_unique<Layer>(c, stack, i));
      register_module(*layers_.back(), "block." + std::to_string(i));
    }
    // The first layer's, for all of them.
    register_module(relative_attention_bias_, "block.0.layer.0.SelfAttention.relative_attention_bias");
    register_module(final_layer_norm_, "final_layer_norm");
  }

  // x: embeddings → states before the final norm.
  at::Tensor forward(at::Tensor x, const at::Tensor& memory, const StackPass& pass) const {
    x = dropped(x, kEmbedding, pass.options);
    const auto bias = [this, pass](int64_t queries, int64_t keys) { return this->bias(queries, keys, pass); };
    for (const auto& layer : layers_) {
      x = run_layer([layer = layer.get(), pass, bias](const at::Tensor& h,
                                                      const at::Tensor& m) { return layer->forward(h, m, pass, bias); },
                    x, memory, pass.options);
    }
    advance(pass.caches, decodes(pass.caches) ? nullptr : &pass.rows);
    return x;
  }

  at::Tensor finish(const at::Tensor& states, const ForwardOptions& options) const {
    return dropped(normed(final_layer_norm_, states), kEnd, options);
  }

  DecodeForm decode_form() const {
    DecodeForm form;
    for (const auto& layer : layers_) form.layers.push_back(layer->decode_form());
    form.activation = config_.activation;
    const at::Tensor& table = relative_attention_bias_.weight.value;
    const at::Tensor behind = at::arange(config_.max_distance + 1, table.options().dtype(at::kLong)).neg_();
    form.distance_bias =
        at::embedding(table, relative_buckets(behind, /*bidirectional=*/false, config_.buckets, config_.max_distance))
            .t()
            .contiguous();
    form.final_norm = &final_layer_norm_;
    return form;
  }

 private:
  at::Tensor dropped(const at::Tensor& x, Place place, const ForwardOptions& options) const {
    return ModelDropout{config_.dropout, stack_, 0, place}.forward(x, options.dropout);
  }

  // [heads, queries, keys]. Where it is trained, each layer makes it anew, so that layers can be run again apart.
  at::Tensor bias(int64_t queries, int64_t keys, const StackPass& pass) const {
    const Lengths lengths = {queries, keys};
    const at::Tensor& table = relative_attention_bias_.weight.value;
    const bool trained = table.requires_grad();
    if (const auto it = pass.biases->find(lengths); it != pass.biases->end() && !trained) return it->second;
    at::Tensor& buckets = (*pass.buckets)[lengths];
    if (!buckets.defined()) {
      const auto options = table.options().dtype(at::kLong);
      const at::Tensor query = at::arange(keys - queries, keys, options), key = at::arange(keys, options);
      buckets = relative_buckets(key.unsqueeze(0) - query.unsqueeze(1), stack_ == ModelDropout::kEncoder,
                                 config_.buckets, config_.max_distance);
    }
    const at::Tensor values = at::embedding(table, buckets).permute({2, 0, 1}).contiguous();
    if (!trained) (*pass.biases)[lengths] = values;
    return values;
  }

  T5Config config_;
  ModelDropout::Stack stack_;
  std::vector<std::unique_ptr<Layer>> layers_;
  RmsNorm final_layer_norm_;
  Embedding relative_attention_bias_;
};

T5::T5(const T5Config& config)
    : LanguageModel(config.vocab_size, config.hidden_size),
      config_(config),
      encoder_(std::make_unique<Stack>(config, ModelDropout::kEncoder, config.encoder_layers)),
      decoder_(std::make_unique<Stack>(config, ModelDropout::kDecoder, config.num_layers)) {
  register_module(embed_tokens, "shared");
  register_module(*encoder_, "encoder");
  register_module(*decoder_, "decoder");
}

T5::~T5() = default;

const Module* T5::encoder() const { return encoder_.get(); }

at::Tensor T5::forward(at::Tensor hidden, const DecoderPass& pass) const {
  StackPass decoding;
  decoding.caches = pass.caches;
  decoding.options = pass.options;
  if (decodes(pass.caches)) return decoder_->forward(hidden, at::Tensor(), decoding);
  StackPass reading;
  reading.rows = *pass.rows;
  reading.options = pass.options;
  const at::Tensor memory = encoder_->finish(encoder_->forward(hidden, at::Tensor(), reading), pass.options);
  decoding.rows = *pass.decoder_rows;
  decoding.memory_rows = *pass.rows;
  return decoder_->forward(embed(pass.decoder_ids), memory, decoding);
}

namespace {

double head_scale(const T5Config& config) {
  return config.scaled_output ? std::pow(static_cast<double>(config.hidden_size), -0.5) : 1.0;
}

}  // namespace

at::Tensor T5::head_input(const at::Tensor& states, const ForwardOptions& options) const {
  const at::Tensor out = decoder_->finish(states, options);
  return config_.scaled_output ? out * head_scale(config_) : out;
}

std::optional<DecodeForm> T5::decode_form(at::ScalarType dtype) const {
  if (dtype == at::kHalf) return std::nullopt;
  DecodeForm form = decoder_->decode_form();
  form.head_scale = head_scale(config_);
  return form;
}

}  // namespace martlet
