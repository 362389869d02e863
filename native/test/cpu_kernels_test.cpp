// What the CPU's kernels decode and round, at each level that this machine has, against ATen's operations bit for bit.
#include "core/base/cpu_kernels.h"

#include <ATen/ATen.h>

#include <atomic>
#include <cmath>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/quant/blockwise.h"
#include "core/quant/int8.h"
#include "core/quant/nf4.h"

using namespace martlet;
using namespace martlet::test;

namespace {

constexpr Isa kLevels[] = {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};
constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};
// Whole blocks and vectors; a rest of each, of the codes' bytes too; more than a piece and a group of scales.
const std::vector<std::vector<int64_t>> kShapes = {{48, 256}, {33, 96}, {5, 71}, {3, 1}, {9, 2190}, {130, 1027}};

at::Tensor part_of(const QuantizedTensor& weight, const std::string& suffix) {
  for (const auto& [name, tensor] : weight.stored()) {
    if (name == suffix) return tensor;
  }
  return {};
}

}  // namespace

TEST("every level rounds to 16 bits as ATen does") {
  // Ties, numbers that rounding carries into the next power of two, subnormal and too large ones.
  at::Tensor values =
      at::cat({randn({1000}, 1), randn({100}, 2) * 1e-39, randn({100}, 3) * 1e38, randn({100}, 4) * 1e-6,
               at::tensor({1.00390625f, 1.01171875f, 1.99999f, 65519.0f, 65520.0f, -0.0f, INFINITY, 0.0f,
                           1.00048828125f, 5.9604645e-8f, 2.98e-8f})});
  for (const Isa isa : kLevels) {
    if (!is_supported(isa)) continue;
    for (const at::ScalarType dtype : kDtypes) {
      for (const int64_t n : {int64_t{1}, int64_t{15}, int64_t{33}, values.numel()}) {
        const at::Tensor from = values.narrow(0, values.numel() - n, n);
        // The numbers behind them stay.
        at::Tensor out = at::full({n + 5}, 7, dtype);
        store_rounded(cpu_kernels(isa), from.const_data_ptr<float>(), n, out.mutable_data_ptr(), 2, dtype);
        const at::Tensor seven = at::full({3}, 7, dtype);
        EXPECT(at::equal(out, at::cat({seven.narrow(0, 0, 2), from.to(dtype), seven})));
      }
    }
  }
}

TEST("every level scales by one factor and then the other") {
  for (const Isa isa : kLevels) {
    if (!is_supported(isa)) continue;
    for (const int64_t n : {1, 16, 77}) {
      const at::Tensor x = randn({n}, 5);
      at::Tensor y = at::cat({x, at::ones({1})});
      cpu_kernels(isa).scale(y.mutable_data_ptr<float>(), n, 0.3f, 0.7f);
      EXPECT_SAME(y, at::cat({x.mul(0.3).mul(0.7), at::ones({1})}));
    }
  }
}

TEST("every level adds a multiple") {
  for (const Isa isa : kLevels) {
    if (!is_supported(isa)) continue;
    for (const int64_t n : {1, 16, 77}) {
      const at::Tensor x = randn({n}, 8), y = randn({n + 1}, 9);
      at::Tensor out = y.clone();
      cpu_kernels(isa).add(x.const_data_ptr<float>(), n, 0.3f, out.mutable_data_ptr<float>());
      EXPECT_CLOSE(out, y + 0.3 * at::cat({x, at::zeros({1})}), 1e-6);
    }
  }
}

TEST("a dequantised NF4 weight is table times scale, rounded once") {
  for (const at::ScalarType dtype : kDtypes) {
    for (const auto& shape : kShapes) {
      for (const bool nested : {false, true}) {
        const QuantizedPtr weight = Nf4Tensor::quantize(randn(shape, 6, dtype), nested);
        at::Tensor scales = part_of(*weight, ".absmax");
        if (nested) {
          const at::Tensor text = part_of(*weight, Nf4Tensor::kStateSuffix);
          const auto* begin = static_cast<const char*>(text.const_data_ptr());
          const auto state = nlohmann::json::parse(begin, begin + text.nbytes());
          scales = dequantize_blockwise(scales, part_of(*weight, ".nested_absmax"),
                                        part_of(*weight, ".nested_quant_map"), Nf4Tensor::kScaleBlock)
                       .add_(state["nested_offset"].get<double>());
        }
        const at::Tensor bytes = part_of(*weight, "").view({-1, 1}).to(at::kInt);
        const at::Tensor codes = at::cat({at::div(bytes, 16, "floor"), bytes.remainder(16)}, 1).view(-1);
        const at::Tensor values = part_of(*weight, ".quant_map").index_select(0, codes);
        const int64_t n = shape[0] * shape[1];
        const at::Tensor by_element = scales.repeat_interleave(Nf4Tensor::kBlock).narrow(0, 0, n);
        EXPECT_SAME(weight->dequantize(), (values.narrow(0, 0, n) * by_element).to(dtype).view(shape));
      }
    }
  }
}

TEST("a dequantised int8 weight is code times scale through 127, rounded once") {
  for (const at::ScalarType dtype : kDtypes) {
    for (const auto& shape : kShapes) {
      const QuantizedPtr weight = Int8Tensor::quantize(randn(shape, 7, dtype));
      EXPECT(!static_cast<const Int8Tensor&>(*weight).outlier_columns().defined());
      const at::Tensor scale = part_of(*weight, ".SCB").unsqueeze(1);
      EXPECT_SAME(weight->dequantize(), part_of(*weight, "").to(at::kFloat).mul(scale).mul(1.0 / 127.0).to(dtype));
    }
  }
}

TEST("parallel ranges are all of the items once") {
  for (const int64_t n : {1, 7, 1000}) {
    std::vector<std::atomic<int>> seen(n);
    parallel_ranges(n, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++seen[i];
    });
    for (const auto& times : seen) EXPECT_EQ(times.load(), 1);
  }
}
