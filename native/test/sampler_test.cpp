#include "core/generate/sampler.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <map>

#include "check.h"

using namespace martlet;
using namespace martlet::test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Logits of these probabilities.
at::Tensor logits_of(const std::vector<double>& probabilities) {
  return at::tensor(probabilities, at::kDouble).log().to(at::kFloat);
}

// How often each id came, over `draws` draws.
std::map<int64_t, double> frequencies(const SamplingOptions& options, const at::Tensor& logits, int draws = 20000) {
  Sampler sampler(options, {});
  std::map<int64_t, double> counts;
  for (int i = 0; i < draws; ++i) counts[sampler.next(logits)] += 1.0 / draws;
  return counts;
}

SamplingOptions sampling(double temperature = 1.0) {
  SamplingOptions options;
  options.temperature = temperature;
  options.seed = 11;
  return options;
}

}  // namespace

TEST("greedy takes the most likely token, the first of equals, whatever the seed and dtype") {
  const at::Tensor logits = at::tensor({0.5f, 3.0f, -1.0f, 3.0f, 2.0f});
  for (uint64_t seed = 0; seed < 4; ++seed) {
    SamplingOptions options;
    options.seed = seed;
    EXPECT_EQ(Sampler(options, {}).next(logits), 1);
    EXPECT_EQ(Sampler(options, {}).next(logits.to(at::kBFloat16)), 1);
  }
}

TEST("sampling follows the probabilities") {
  const auto counts = frequencies(sampling(), logits_of({0.1, 0.6, 0.3}));
  // 20000 draws: a standard deviation of at most 0.0035.
  EXPECT_CLOSE(counts.at(0), 0.1, 0.015);
  EXPECT_CLOSE(counts.at(1), 0.6, 0.015);
  EXPECT_CLOSE(counts.at(2), 0.3, 0.015);
}

TEST("temperature divides the logits") {
  // At 0.5 probabilities are squared: 0.64 and 0.04 of 0.68.
  const auto counts = frequencies(sampling(0.5), logits_of({0.8, 0.2}));
  EXPECT_CLOSE(counts.at(0), 0.64 / 0.68, 0.015);
}

TEST("top-k keeps the k most likely, in their proportions") {
  SamplingOptions options = sampling();
  options.top_k = 2;
  const auto counts = frequencies(options, logits_of({0.2, 0.4, 0.1, 0.3}));
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_CLOSE(counts.at(1), 4.0 / 7, 0.015);
  EXPECT_CLOSE(counts.at(3), 3.0 / 7, 0.015);
  options.top_k = 1;
  EXPECT_EQ(frequencies(options, logits_of({0.2, 0.4, 0.1, 0.3}), 100).size(), 1u);
  options.top_k = 100;  // more than there are
  EXPECT_EQ(frequencies(options, logits_of({0.2, 0.4, 0.1, 0.3})).size(), 4u);
}

TEST("top-p keeps the smallest set that reaches p, at least one token") {
  SamplingOptions options = sampling();
  const at::Tensor logits = logits_of({0.15, 0.5, 0.05, 0.3});
  options.top_p = 0.7;  // 0.5 + 0.3
  const auto counts = frequencies(options, logits);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_CLOSE(counts.at(1), 0.5 / 0.8, 0.015);
  EXPECT_CLOSE(counts.at(3), 0.3 / 0.8, 0.015);
  options.top_p = 0.9;
  EXPECT_EQ(frequencies(options, logits).size(), 3u);
  options.top_p = 1e-9;
  EXPECT_EQ(frequencies(options, logits, 100).size(), 1u);
}

TEST("top-p is taken of what top-k left") {
  SamplingOptions options = sampling();
  options.top_k = 2;
  options.top_p = 0.6;  // of {0.5, 0.3}/0.8 the first alone has 0.625; of the whole two would be needed
  EXPECT_EQ(frequencies(options, logits_of({0.15, 0.5, 0.05, 0.3}), 1000).size(), 1u);
}

TEST("repetition penalty: positive logits are divided, negative ones multiplied, for prompt and answer, once a token") {
  SamplingOptions options;
  options.repetition_penalty = 2.0;
  const at::Tensor logits = at::tensor({3.0f, 2.0f, 1.0f});
  Sampler sampler(options, {0, 0, 0});
  EXPECT_EQ(sampler.next(logits), 1);                          // 1.5, 2, 1
  EXPECT_EQ(sampler.next(logits), 0);                          // 1.5, 1, 1: a penalty by count would have 0.375
  EXPECT_EQ(sampler.next(at::tensor({1.9f, 0.0f, 1.0f})), 2);  // 0.95, 0, 1
  EXPECT_EQ(Sampler(options, {0}).next(at::tensor({-1.0f, -1.5f})), 1);  // -2, -1.5
  EXPECT_EQ(Sampler(options, {7, -1}).next(logits), 0);                  // ids outside the vocabulary say nothing
  SamplingOptions off;
  EXPECT_EQ(Sampler(off, {0}).next(logits), 0);
}

TEST("the same seed gives the same tokens, another seed others") {
  const at::Tensor logits = randn({50}, 3);
  const auto draw = [&](uint64_t seed) {
    SamplingOptions options = sampling(1.5);
    options.seed = seed;
    Sampler sampler(options, {});
    std::vector<int64_t> ids;
    for (int i = 0; i < 40; ++i) ids.push_back(sampler.next(logits));
    return ids;
  };
  EXPECT(draw(1) == draw(1));
  EXPECT(draw(1) != draw(2));
}

TEST("a token of probability zero is never drawn") {
  const auto counts = frequencies(sampling(), at::tensor({-kInfinity, 0.0f, -kInfinity}), 1000);
  EXPECT_EQ(counts.size(), 1u);
  EXPECT_EQ(counts.count(1), 1u);
}

TEST("logits that are not finite are ERR_MARTLET_NON_FINITE") {
  for (const float bad : {std::nanf(""), kInfinity}) {
    EXPECT_THROWS_CODE(code::kNonFinite, Sampler(sampling(), {}).next(at::tensor({0.0f, bad, 1.0f})));
    EXPECT_THROWS_CODE(code::kNonFinite, Sampler(sampling(), {}).next(at::full({4}, bad, at::kFloat)));
  }
  EXPECT_THROWS_CODE(code::kNonFinite, Sampler(sampling(), {}).next(at::full({4}, -kInfinity, at::kFloat)));
  EXPECT_THROWS_CODE(code::kNonFinite, Sampler({}, {}).next(at::full({4}, std::nanf(""), at::kFloat)));
  SamplingOptions penalised;
  penalised.repetition_penalty = 1.5;
  EXPECT_THROWS_CODE(code::kNonFinite, Sampler(penalised, {0}).next(at::full({4}, std::nanf(""), at::kFloat)));
}
