#include "core/vision/feature_cache.h"

#include <ATen/ATen.h>

#include "check.h"

using namespace martlet;
using namespace martlet::test;

namespace {

const PatchGrid kGrid = {1, 4, 6};

// 4000 bytes.
VisionFeatures features(uint64_t seed) { return {randn({10, 50}, seed), {randn({10, 50}, seed + 1000)}}; }

bool same(const std::shared_ptr<const PictureFeatures>& found, const VisionFeatures& expected) {
  return found != nullptr && at::equal(found->values.tokens, expected.tokens) && found->values.deepstack.size() == 1 &&
         at::equal(found->values.deepstack[0], expected.deepstack[0]) && found->grid.t == kGrid.t &&
         found->grid.h == kGrid.h && found->grid.w == kGrid.w;
}

FeatureCacheOptions on_disk(const TemporaryFolder& folder, size_t bytes = 1 << 20, std::string fingerprint = "f0") {
  return {bytes, folder.path(), std::move(fingerprint), false};
}

std::filesystem::path file_of(const TemporaryFolder& folder, const std::string& key) {
  return folder / "f0" / (key + ".safetensors");
}

}  // namespace

TEST("the longest unused goes when the bound is reached; what is larger than the bound is not kept") {
  FeatureCache cache({12000, {}, {}, false});
  for (const uint64_t i : {1, 2, 3}) cache.put("a" + std::to_string(i), kGrid, features(i));
  EXPECT_EQ(cache.counts().bytes, 12000);
  EXPECT(same(cache.find("a1"), features(1)));
  cache.put("a4", kGrid, features(4));
  EXPECT_EQ(cache.counts().bytes, 12000);
  EXPECT(cache.find("a2") == nullptr);
  for (const uint64_t i : {1, 3, 4}) EXPECT(same(cache.find("a" + std::to_string(i)), features(i)));
  cache.put("b", kGrid, {at::zeros({4000}), {}});
  EXPECT(cache.find("b") == nullptr);
  EXPECT_EQ(cache.counts().hits, 4);
  EXPECT_EQ(cache.counts().misses, 2);
}

TEST("what is kept is a copy, and no inference tensor") {
  FeatureCache cache({1 << 20, {}, {}, false});
  const VisionFeatures given = features(1);
  {
    const c10::InferenceMode inference;
    cache.put("a", kGrid, {given.tokens + 0, {given.deepstack[0] + 0}});
  }
  cache.put("b", kGrid, given);
  given.tokens.zero_();
  EXPECT(!cache.find("a")->values.tokens.is_inference());
  EXPECT(same(cache.find("a"), features(1)));
  EXPECT(same(cache.find("b"), features(1)));
}

TEST("files are found again by another cache of the same fingerprint, and by no other") {
  const TemporaryFolder folder;
  FeatureCache(on_disk(folder)).put("a", kGrid, features(1));
  FeatureCache again(on_disk(folder));
  EXPECT(again.counts().bytes > 0);
  EXPECT(same(again.find("a"), features(1)));
  FeatureCache other(on_disk(folder, 1 << 20, "f1"));
  EXPECT(other.find("a") == nullptr);
}

TEST("files keep to the bound, those of an earlier run too") {
  const TemporaryFolder folder;
  {
    FeatureCache cache(on_disk(folder));
    for (const uint64_t i : {1, 2, 3, 4}) cache.put("a" + std::to_string(i), kGrid, features(i));
  }
  FeatureCache small(on_disk(folder, 9000));
  EXPECT(small.counts().bytes <= 9000);
  small.put("a9", kGrid, features(9));
  size_t total = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder / "f0")) total += entry.file_size();
  EXPECT_EQ(static_cast<int64_t>(total), small.counts().bytes);
  EXPECT(total <= 9000);
  EXPECT(same(small.find("a9"), features(9)));
}

TEST("a damaged, cut, foreign or renamed file is a miss, and goes") {
  const TemporaryFolder folder;
  FeatureCache(on_disk(folder)).put("a", kGrid, features(1));
  const std::string whole = read_bytes(file_of(folder, "a"));
  std::string flipped = whole;
  flipped[flipped.size() - 5] = static_cast<char>(flipped[flipped.size() - 5] ^ 1);
  for (const std::string& bytes : {flipped, whole.substr(0, whole.size() / 2), std::string("text"), std::string()}) {
    write_bytes(file_of(folder, "a"), bytes);
    FeatureCache cache(on_disk(folder));
    EXPECT(cache.find("a") == nullptr);
    EXPECT(!std::filesystem::exists(file_of(folder, "a")));
    EXPECT_EQ(cache.counts().bytes, 0);
    cache.put("a", kGrid, features(1));
    EXPECT(same(cache.find("a"), features(1)));
  }
  write_bytes(file_of(folder, "b"), whole);
  FeatureCache cache(on_disk(folder));
  EXPECT(cache.find("b") == nullptr);
  EXPECT(same(cache.find("a"), features(1)));
}

TEST("a folder that cannot be written to ends the storing, with the reason") {
  const TemporaryFolder folder;
  FeatureCache cache(on_disk(folder));
  std::filesystem::remove_all(folder / "f0");
  cache.put("a", kGrid, features(1));
  EXPECT(cache.find("a") == nullptr);
  EXPECT(!cache.counts().error.empty());
}
