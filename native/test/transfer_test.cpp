#include "core/io/transfer.h"

#include <ATen/ATen.h>

#include <atomic>

#include "check.h"
#include "core/io/mapped_file.h"
#include "core/io/safetensors.h"

using namespace martlet;
using namespace martlet::test;

namespace {

// More than two blocks, and no whole number of them.
constexpr int64_t kElements = static_cast<int64_t>(2 * kTransferBlock / 4) + 1001;

std::shared_ptr<SafetensorsFile> file_of(const TemporaryFolder& folder, const at::Tensor& tensor) {
  write_safetensors(folder / "m.safetensors", {{"before", at::ones({8}, at::kByte)}, {"w", tensor}}, {});
  return SafetensorsFile::open(folder / "m.safetensors");
}

}  // namespace

TEST("WeightReader: what lies in a file comes out bit for bit, in one dtype or another, as it stands or as a view") {
  const TemporaryFolder folder;
  const at::Tensor w = randn({kElements}, 1);
  write_safetensors(folder / "m.safetensors", {{"w", w}, {"odd", at::arange(7, at::kLong)}}, {});
  const auto file = SafetensorsFile::open(folder / "m.safetensors");
  WeightReader reader;
  const at::Tensor whole = at::zeros({kElements}), narrow = at::zeros({kElements}, at::kBFloat16),
                   part = at::zeros({10, 100}), strided = at::zeros({kElements / 2}), odd = at::zeros({7}, at::kLong),
                   from_memory = at::zeros({kElements});
  const at::Tensor stored = file->tensor("w");
  reader.read(stored, whole);
  reader.read(stored, narrow);
  reader.read(stored.narrow(0, 77, 1000), part);
  reader.read(stored.narrow(0, 0, kElements / 2 * 2).view({-1, 2}).select(1, 1), strided);
  reader.read(file->tensor("odd"), odd);
  reader.read(w, from_memory);
  reader.wait();
  EXPECT(at::equal(whole, w));
  EXPECT(at::equal(narrow, w.to(at::kBFloat16)));
  EXPECT(at::equal(part, w.narrow(0, 77, 1000).view({10, 100})));
  EXPECT(at::equal(strided, w.narrow(0, 0, kElements / 2 * 2).view({-1, 2}).select(1, 1)));
  EXPECT(at::equal(odd, at::arange(7, at::kLong)));
  EXPECT(at::equal(from_memory, w));
}

TEST("WeightReader: a file that became shorter is an error that names it, not a crash") {
  const TemporaryFolder folder;
  const at::Tensor w = randn({kElements}, 1);
  const auto file = file_of(folder, w);
  std::filesystem::resize_file(folder / "m.safetensors", kTransferBlock);
  WeightReader reader;
  const at::Tensor target = at::zeros({kElements});
  const Error error = EXPECT_THROWS_CODE(code::kIo, [&] {
    reader.read(file->tensor("w"), target);
    reader.wait();
  }());
  EXPECT_CONTAINS(std::string(error.what()), "m.safetensors");
}

TEST("MappedFile::of knows its own tensors and their views, and no others") {
  const TemporaryFolder folder;
  const auto file = file_of(folder, randn({64}, 1));
  const at::Tensor w = file->tensor("before");
  const MappedFile* mapped = MappedFile::of(w);
  EXPECT(mapped != nullptr);
  EXPECT(MappedFile::of(w.narrow(0, 1, 2)) == mapped);
  EXPECT_EQ(mapped->offset_of(w.narrow(0, 1, 2)), mapped->offset_of(w) + 1);
  EXPECT(MappedFile::of(w.clone()) == nullptr);
  EXPECT(MappedFile::of(at::ones({3})) == nullptr);
}

TEST("ShardWriter: large tensors, views of a file, strided and empty ones are written as they are") {
  const TemporaryFolder in, out;
  const at::Tensor w = randn({kElements}, 1), matrix = randn({300, 200}, 2).t(), none = at::empty({0, 4});
  const at::Tensor flag = at::ones({3}, at::kBool), scalar = at::full({}, 2.5);
  const auto file = file_of(in, w);
  const std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {"memory", w}, {"file", file->tensor("w")}, {"matrix", matrix}, {"none", none}, {"flag", flag}, {"one", scalar}};
  ShardPlan plan;
  for (const auto& [name, tensor] : tensors) plan.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  ShardWriter writer(out.path(), plan, int64_t{1} << 30);
  for (const auto& [name, tensor] : tensors) writer.add(name, tensor);
  EXPECT_EQ(writer.finish().size(), 1u);
  EXPECT_EQ(out.names().size(), 1u);
  const auto written = SafetensorsFile::open(out / "model.safetensors");
  for (const auto& [name, tensor] : tensors) EXPECT(at::equal(written->tensor(name), tensor));
}

TEST("ShardWriter: what it reads from breaks off: an error, and no file under its name") {
  const TemporaryFolder in, out;
  const auto file = file_of(in, randn({kElements}, 1));
  std::filesystem::resize_file(in / "m.safetensors", kTransferBlock);
  {
    const at::Tensor w = file->tensor("w");
    ShardWriter writer(out.path(), {{"w", w.scalar_type(), w.sizes().vec()}}, int64_t{1} << 30);
    EXPECT_THROWS_CODE(code::kIo, [&] {
      writer.add("w", w);
      writer.finish();
    }());
  }
  EXPECT_EQ(out.names().size(), 0u);
}

TEST("TransferPool: at most so much at once, and the first error ends it") {
  std::atomic<int64_t> held{0}, most{0}, ran{0};
  {
    TransferPool pool(3, 100);
    for (int i = 0; i < 50; ++i) {
      pool.submit(40, [&](StagingBuffers&) {
        const int64_t now = held += 40;
        for (int64_t seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
        }
        std::this_thread::yield();
        ++ran;
        held -= 40;
      });
    }
    pool.submit(1000, [&](StagingBuffers&) { ++ran; });  // larger than the limit: alone
    pool.wait();
  }
  EXPECT_EQ(ran.load(), 51);
  EXPECT(most.load() <= 80);
  TransferPool pool(2, 100);
  pool.submit(1, [](StagingBuffers&) { fail(code::kIo, "broken"); });
  EXPECT_THROWS_CODE(code::kIo, pool.wait());
  EXPECT_THROWS_CODE(code::kIo, pool.submit(1, [](StagingBuffers&) {}));
}
