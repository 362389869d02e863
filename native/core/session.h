// One session = one engine thread's state: a loaded model, its adapters, a training run. It answers the methods of
// lib/native/binding.ts. No N-API here; the addon calls handle() on the engine thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/base/job.h"

namespace martlet {

// Bytes borrowed from JavaScript until the job ends.
struct BufferView {
  const uint8_t* data = nullptr;
  size_t size = 0;
};

struct Reply {
  std::string result = "{}";  // JSON
  std::vector<std::vector<uint8_t>> buffers;
};

class Session {
 public:
  Session();
  ~Session();
  // Runs one method. Throws Error (any other exception is turned into one by the caller through
  // current_exception_as_error).
  Reply handle(const std::string& method, const std::string& args_json, const std::vector<BufferView>& buffers,
               JobContext& job);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// libtorch's threads in an operation on host memory; 0: as many as it likes. `beside_gpu`: of a model on a GPU, whose
// host work is small: more would only spin, on cores that the threads that feed the GPU need.
struct ThreadCounts {
  int cpu = 0, beside_gpu = 0;
};
// Process-wide: loads the CUDA libraries found in `libtorch_lib` when `cuda` is asked for (before anything asks whether
// CUDA is there), and sets intra-op threads for threads started later. Idempotent.
void initialize_runtime(const std::string& libtorch_lib, bool cuda, ThreadCounts threads);
// JSON of SystemInfo in lib/native/binding.ts.
std::string system_info_json();
// Version of the headers compiled against, e.g. "2.13.0".
const char* compiled_torch_version();

}  // namespace martlet
