#include "core/io/safetensors.h"

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "check.h"
#include "core/io/checkpoint.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

// 8 bytes of length, the header, the data.
std::string file_bytes(const std::string& header, const std::string& data, std::optional<uint64_t> length = {}) {
  const uint64_t n = length.value_or(header.size());
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(n >> (8 * i) & 0xff);
  return out + header + data;
}

json entry(const char* dtype, std::vector<int64_t> shape, int64_t begin, int64_t end) {
  return {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {begin, end}}};
}

// Opening such a file must fail with ERR_MARTLET_WEIGHTS, name the file, and say `part`.
void check_refused(const std::string& bytes, const std::string& part, const char* about) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "bad.safetensors";
  write_bytes(path, bytes);
  const Error error = expect_error(code::kWeights, [&] { SafetensorsFile::open(path); }, about, __FILE__, __LINE__);
  check_contains(error.what(), part, about, 0);
  check_contains(json::parse(error.details_json()).value("path", ""), path.string(), about, 0);
}

ShardPlan plan_of(const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  ShardPlan plan;
  for (const auto& [name, tensor] : tensors) {
    TensorInfo info;
    info.name = name;
    info.dtype = tensor.scalar_type();
    info.shape = tensor.sizes().vec();
    plan.push_back(info);
  }
  return plan;
}

std::vector<std::string> write_shards(const std::filesystem::path& dir,
                                      const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                                      int64_t max_shard_size) {
  ShardWriter writer(dir, plan_of(tensors), max_shard_size);
  for (const auto& [name, tensor] : tensors) writer.add(name, tensor);
  return writer.finish();
}

std::vector<std::pair<std::string, at::Tensor>> samples() {
  return {{"b.weight", randn({3, 5}, 1)},
          {"a.half", randn({7}, 2, at::kHalf)},
          {"a.bf16", randn({2, 1, 3}, 3, at::kBFloat16)},
          {"ids", at::arange(9, at::kLong)},
          {"flag", at::tensor({1, 0, 1}, at::kInt).to(at::kBool)},
          {"scalar", randn({}, 4)},
          {"none", at::empty({0, 4}, at::kFloat)},
          {"transposed", randn({4, 6}, 5).t()}};
}

}  // namespace

TEST("what write_safetensors writes is read back to the bit") {
  const TemporaryFolder folder;
  const auto tensors = samples();
  write_safetensors(folder / "m.safetensors", tensors, {{"format", "pt"}, {"note", "ü"}});
  const auto file = SafetensorsFile::open(folder / "m.safetensors");
  EXPECT_EQ(file->tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_SAME(file->tensor(name), tensor);
  EXPECT(!file->tensor("absent").defined());
  EXPECT_EQ(file->metadata().at("note"), "ü");
  EXPECT_EQ(folder.names().size(), 1u);
}

TEST("a tensor outlives the file object it came from") {
  const TemporaryFolder folder;
  const at::Tensor value = randn({100, 100}, 1);
  write_safetensors(folder / "m.safetensors", {{"w", value}}, {});
  const at::Tensor read = SafetensorsFile::open(folder / "m.safetensors")->tensor("w");
  EXPECT_SAME(read, value);
}

TEST("tensors at odd offsets are read") {
  const TemporaryFolder folder;
  const at::Tensor value = randn({3}, 1);
  // One byte before it, and a header whose length is no multiple of 8.
  const std::string header = json{{"byte", entry("U8", {1}, 0, 1)}, {"w", entry("F32", {3}, 1, 13)}}.dump();
  write_bytes(folder / "m.safetensors",
              file_bytes(header, "x" + std::string(static_cast<const char*>(value.const_data_ptr()), 12)));
  EXPECT_SAME(SafetensorsFile::open(folder / "m.safetensors")->tensor("w"), value);
}

TEST("ShardWriter: one shard is model.safetensors without an index") {
  const TemporaryFolder folder;
  const auto tensors = samples();
  EXPECT(write_shards(folder.path(), tensors, int64_t{1} << 30) == std::vector<std::string>{"model.safetensors"});
  EXPECT(folder.names() == std::vector<std::string>{"model.safetensors"});
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  for (const auto& [name, tensor] : tensors) EXPECT_SAME(checkpoint.tensor(name), tensor);
}

TEST("ShardWriter: shards keep to the size and are read back through the index") {
  const TemporaryFolder folder;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (int i = 0; i < 6; ++i) tensors.emplace_back("t" + std::to_string(i), randn({i == 2 ? 40 : 10}, 10 + i));
  const auto files = write_shards(folder.path(), tensors, 80);
  // 40-byte tensors two by two; the 160-byte one is larger than a shard and stands alone.
  EXPECT_EQ(files.size(), 4u);
  EXPECT_EQ(files.front(), "model-00001-of-00004.safetensors");
  const json index = json::parse(read_bytes(folder / "model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"].get<int64_t>(), 360);
  EXPECT_EQ(index["weight_map"]["t2"].get<std::string>(), "model-00002-of-00004.safetensors");
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  EXPECT_EQ(checkpoint.names().size(), 6u);
  for (const auto& [name, tensor] : tensors) EXPECT_SAME(checkpoint.tensor(name), tensor);
}

TEST("ShardWriter: a tensor off the plan, or too few, is an error and leaves no whole file") {
  const TemporaryFolder folder;
  const std::vector<std::pair<std::string, at::Tensor>> tensors = {{"a", randn({4}, 1)}, {"b", randn({4}, 2)}};
  {
    ShardWriter writer(folder.path(), plan_of(tensors), 1 << 20);
    writer.add("a", tensors[0].second);
    EXPECT_THROWS_CODE(code::kInternal, writer.add("a", tensors[0].second));
    EXPECT_THROWS_CODE(code::kInternal, writer.add("b", randn({5}, 2)));
    EXPECT_THROWS_CODE(code::kInternal, writer.add("b", randn({4}, 2, at::kHalf)));
    EXPECT_THROWS_CODE(code::kInternal, writer.finish());
  }
  EXPECT_EQ(folder.names().size(), 0u);
}

TEST("a file cut anywhere is refused") {
  const TemporaryFolder folder;
  write_safetensors(folder / "m.safetensors", samples(), {{"format", "pt"}});
  const std::string whole = read_bytes(folder / "m.safetensors");
  int opened = 0;
  for (size_t size = 0; size < whole.size(); ++size) {
    write_bytes(folder / "cut.safetensors", std::string_view(whole).substr(0, size));
    try {
      SafetensorsFile::open(folder / "cut.safetensors");
      ++opened;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code::kWeights);
      EXPECT_CONTAINS(error.what(), "cut.safetensors");
    }
  }
  EXPECT_EQ(opened, 0);
}

TEST("a header whose length lies is refused") {
  const std::string header = json{{"w", entry("F32", {1}, 0, 4)}}.dump(), data(4, '\0');
  check_refused(file_bytes(header, data, header.size() + data.size() + 1), "header claims", "past the end");
  check_refused(file_bytes(header, data, ~uint64_t{0}), "header claims", "2^64 - 1");
  check_refused(file_bytes(header, data, uint64_t{1} << 63), "header claims", "2^63");
  check_refused(file_bytes(header, data, header.size() - 1), "not JSON", "too short");
  check_refused(file_bytes(header, data, 0), "not JSON", "zero");
}

TEST("a header that is no JSON object of tensors is refused") {
  check_refused(file_bytes("not json", ""), "not JSON", "text");
  check_refused(file_bytes("{\"w\":\xff}", ""), "not JSON", "a byte that is not UTF-8");
  check_refused(file_bytes(std::string(100000, '['), ""), "not JSON", "deep nesting");
  check_refused(file_bytes("[1, 2]", ""), "not a JSON object", "an array");
  check_refused(file_bytes("{\"w\": 3}", ""), "tensor w", "a number for a tensor");
  check_refused(file_bytes("{\"w\": {\"dtype\": \"F32\"}}", ""), "tensor w", "fields missing");
  check_refused(file_bytes("{\"__metadata__\": {\"a\": 1}}", ""), "__metadata__.a", "metadata of numbers");
  check_refused(file_bytes("{\"__metadata__\": []}", ""), "__metadata__", "metadata as an array");
  const std::string one = entry("F32", {1}, 0, 4).dump();
  check_refused(file_bytes("{\"w\":" + one + ",\"w\":" + one + "}", std::string(4, '\0')), "twice", "a name twice");
}

TEST("a tensor whose description cannot be true is refused, by its name") {
  const std::string data(16, '\0');
  const auto refused = [&](const json& description, const std::string& part, const char* about) {
    check_refused(file_bytes(json{{"layer.w", description}}.dump(), data), part, about);
    check_refused(file_bytes(json{{"layer.w", description}}.dump(), data), "layer.w", about);
  };
  refused(entry("F31", {4}, 0, 16), "unknown dtype", "a dtype of no known name");
  refused(entry("F32", {5}, 0, 16), "its shape and dtype need 20", "a shape larger than the bytes");
  refused(entry("F16", {4}, 0, 16), "its shape and dtype need 8", "a dtype smaller than the bytes");
  refused(entry("F32", {4}, 4, 20), "claims the bytes", "an end past the file");
  refused(entry("F32", {4}, 16, 0), "claims the bytes", "an end before the beginning");
  refused(entry("F32", {2}, 8, 16), "leaves a hole", "a beginning after a hole");
  refused(entry("F32", {-4}, 0, 16), "shape", "a negative extent");
  refused(entry("F32", {int64_t{1} << 62, 4}, 0, 16), "impossible shape", "a product past 64 bits");
  json description = entry("F32", {4}, 0, 16);
  description["shape"] = {4.5};
  refused(description, "whole numbers", "a fraction");
  description["shape"] = "4";
  refused(description, "no shape", "a string for a shape");
  description = entry("F32", {4}, 0, 16);
  description["dtype"] = 32;
  refused(description, "unknown dtype", "a number for a dtype");
  description = entry("F32", {4}, 0, 16);
  description["data_offsets"] = {0, 8, 16};
  refused(description, "data_offsets", "three offsets");
  description["data_offsets"] = {-1, 15};
  refused(description, "data_offsets", "a negative offset");
}

TEST("tensors that overlap, and bytes that belong to none, are refused") {
  const std::string overlap = json{{"a", entry("F32", {2}, 0, 8)}, {"b", entry("F32", {2}, 4, 12)}}.dump();
  check_refused(file_bytes(overlap, std::string(12, '\0')), "overlaps", "overlap");
  const std::string short_header = json{{"a", entry("F32", {2}, 0, 8)}}.dump();
  check_refused(file_bytes(short_header, std::string(9, '\0')), "9 bytes", "a byte too many");
}

TEST("an empty shape with extents whose strides overflow is refused") {
  const std::string header = json{{"w", entry("F32", {0, int64_t{1} << 62, int64_t{1} << 62}, 0, 0)}}.dump();
  check_refused(file_bytes(header, ""), "impossible shape", "no elements, endless strides");
}

TEST("what is not a file is refused") {
  const TemporaryFolder folder;
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, SafetensorsFile::open(folder / "absent")).what(), "absent");
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, SafetensorsFile::open(folder.path())).what(),
                  "not a regular file");
}

TEST("a checkpoint whose index and shards disagree is refused") {
  const TemporaryFolder folder;
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, Checkpoint::open(folder.path())).what(), "weights are missing");

  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (int i = 0; i < 4; ++i) tensors.emplace_back("t" + std::to_string(i), randn({10}, i));
  write_shards(folder.path(), tensors, 80);  // two a shard
  const std::filesystem::path index_path = folder / "model.safetensors.index.json";
  const json index = json::parse(read_bytes(index_path));
  const auto with_map = [&](const char* key, const json& shard) {
    json changed = index;
    if (shard.is_null()) {
      changed["weight_map"].erase(key);
    } else {
      changed["weight_map"][key] = shard;
    }
    write_bytes(index_path, changed.dump());
  };
  const auto refused = [&](const std::string& part) {
    EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, Checkpoint::open(folder.path())).what(), part);
  };

  with_map("t9", "model-00002-of-00002.safetensors");
  refused("t9");
  with_map("t1", nullptr);
  refused("t1");
  with_map("t1", "model-00002-of-00002.safetensors");
  refused("t1");
  for (const char* leaving : {"../model.safetensors", "/etc/passwd", "..", ""}) {
    with_map("t1", leaving);
    refused("not a file of this folder");
  }
  with_map("t1", 7);
  refused("not a file of this folder");
  write_bytes(index_path, "{\"weight_map\": []}");
  refused("no weight_map");
  write_bytes(index_path, "[]");
  refused("no weight_map");

  write_bytes(index_path, index.dump());
  std::filesystem::remove(folder / "model-00002-of-00002.safetensors");
  refused("model-00002-of-00002.safetensors is missing");
}
