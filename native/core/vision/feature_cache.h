// What pictures become in frozen modules, kept for when they come again: in host memory (pinned where a GPU reads it)
// or in a folder, the longest unused going first when a bound of bytes is reached.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/vision/patch_grid.h"

namespace martlet {

// What pictures become.
struct VisionFeatures {
  at::Tensor tokens;  // [image tokens, hidden], in the order of the pictures
  // Deepstack: the same shape each; k is added to the hidden states of the image tokens after the decoder's layer k.
  std::vector<at::Tensor> deepstack;
};

// Of one picture, on the CPU.
struct PictureFeatures {
  PatchGrid grid;
  VisionFeatures values;
};

struct FeatureCacheOptions {
  size_t max_bytes = 0;
  // Where files go, in a folder for each fingerprint; empty: memory.
  std::filesystem::path dir;
  // Of everything beside the picture that the features follow from (feature_fingerprint). Files only: what is in memory
  // is of one model.
  std::string fingerprint;
  bool pinned = false;
};

class FeatureCache {
 public:
  struct Counts {
    int64_t hits = 0, misses = 0, bytes = 0;
    std::string error;  // why nothing is stored any more
  };

  // Files of an earlier run count. ERR_MARTLET_IO when the folder cannot be made.
  explicit FeatureCache(FeatureCacheOptions options);
  // Null: it is not there. A file that is damaged, or not of that key, is not there and is removed. `key`: hexadecimal
  // digits that stand for the picture's bytes and what is done to them.
  std::shared_ptr<const PictureFeatures> find(const std::string& key);
  // `values`: of any device. A folder that cannot be written to any more ends the storing, not the run.
  void put(const std::string& key, const PatchGrid& grid, const VisionFeatures& values);
  const Counts& counts() const { return counts_; }

 private:
  struct Entry {
    std::list<std::string>::iterator place;
    size_t bytes = 0;
    std::shared_ptr<const PictureFeatures> features;  // null: in a file
  };
  std::filesystem::path file_of(const std::string& key) const;
  // Lets go of what was used longest ago, until so many bytes more fit.
  void make_room(size_t bytes);
  void remove(const std::string& key);

  FeatureCacheOptions options_;
  std::list<std::string> order_;  // the longest unused first
  std::unordered_map<std::string, Entry> entries_;
  Counts counts_;
};

}  // namespace martlet
