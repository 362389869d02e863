// Weights between files and a GPU. The times are printed: a load's and a save's rate from and to the page cache.
#include "core/io/transfer.h"

#include <ATen/ATen.h>

#include <chrono>
#include <cstdio>

#include "check.h"
#include "core/base/memory.h"
#include "core/io/safetensors.h"
#include "cuda/gpu.h"

using namespace martlet;
using namespace martlet::test;

namespace {

double seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  synchronize(gpu());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST("a file goes to the GPU and back as it is; both directions in several blocks, and in another dtype") {
  const TemporaryFolder in, out;
  const int64_t n = 3 * static_cast<int64_t>(kTransferBlock) + 12345;
  const at::Tensor w = randn({n}, 1).to(at::kBFloat16), wide = randn({n / 3}, 2);
  write_safetensors(in / "m.safetensors", {{"w", w}, {"wide", wide}}, {});
  const auto file = SafetensorsFile::open(in / "m.safetensors");
  WeightReader reader;
  const auto options = at::TensorOptions().device(gpu()).dtype(at::kBFloat16);
  const at::Tensor on_gpu = at::zeros({n}, options), narrow = at::zeros({n / 3}, options);
  reader.read(file->tensor("w"), on_gpu);
  reader.read(file->tensor("wide"), narrow);
  reader.wait();
  EXPECT(at::equal(on_gpu.cpu(), w));
  EXPECT(at::equal(narrow.cpu(), wide.to(at::kBFloat16)));
  ShardWriter writer(out.path(), {{"w", at::kBFloat16, {n}}, {"file", at::kFloat, {n / 3}}}, int64_t{1} << 40);
  writer.add("w", on_gpu);
  writer.add("file", file->tensor("wide"));
  writer.finish();
  const auto written = SafetensorsFile::open(out / "model.safetensors");
  EXPECT(at::equal(written->tensor("w"), w));
  EXPECT(at::equal(written->tensor("file"), wide));
}

TEST("rates of loading and saving 4 GiB") {
  const TemporaryFolder in, out;
  const int64_t n = int64_t{1} << 26;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  ShardPlan plan;
  for (int i = 0; i < 32; ++i) {
    tensors.emplace_back("w" + std::to_string(i), at::full({n}, i, at::kBFloat16));
    plan.push_back({tensors.back().first, at::kBFloat16, {n}});
  }
  write_safetensors(in / "m.safetensors", tensors, {});
  tensors.clear();
  const auto file = SafetensorsFile::open(in / "m.safetensors");
  const double bytes = 32.0 * 2 * static_cast<double>(n);
  std::vector<at::Tensor> loaded;
  for (int run = 0; run < 2; ++run) {
    loaded.clear();
    const double load = seconds([&] {
      WeightReader reader;
      for (const TensorInfo& info : plan) {
        loaded.push_back(at::empty({n}, at::TensorOptions().device(gpu()).dtype(at::kBFloat16)));
        reader.read(file->tensor(info.name), loaded.back());
      }
      reader.wait();
    });
    const double save = seconds([&] {
      ShardWriter writer(out.path(), plan, int64_t{1} << 40);
      for (size_t i = 0; i < plan.size(); ++i) writer.add(plan[i].name, loaded[i]);
      writer.finish();
    });
    std::printf("  load %.2f GB/s, save %.2f GB/s\n", bytes / load * 1e-9, bytes / save * 1e-9);
  }
  for (int i = 0; i < 32; ++i)
    EXPECT(at::equal(loaded[static_cast<size_t>(i)][n - 1].cpu(), at::full({}, i, at::kBFloat16)));
}
