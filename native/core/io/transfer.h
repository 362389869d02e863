// Threads that move weights between files, host memory and the device, so that reading, copying and writing overlap.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace martlet {

// Bytes that are moved at once.
constexpr size_t kTransferBlock = size_t{8} << 20;

// Two blocks of host memory used in turn; pinned where they serve a CUDA device, which then reads and writes them at
// its bus's full speed while the other block is filled.
class StagingBuffers {
 public:
  // [bytes] uint8, free to be overwritten. bytes <= kTransferBlock.
  at::Tensor next(size_t bytes, at::Device device);
  // The copy that was just queued between the last buffer and `device`: next() waits for it before it hands that buffer
  // out again.
  void in_use(at::Device device);
  // Waits for it now.
  void wait(at::Device device);

 private:
  struct Slot {
    at::Tensor memory;
    bool pinned = false;
    std::optional<c10::Event> copied;
  };
  Slot slots_[2];
  size_t last_ = 0;
};

// Runs tasks in the order of submit() on several threads. The first exception of a task ends all of them, and is thrown
// by the next submit() or wait().
class TransferPool {
 public:
  using Task = std::function<void(StagingBuffers&)>;

  // `max_pending`: bytes of tasks that have not ended, above which submit() waits.
  TransferPool(int threads, size_t max_pending);
  // Tasks that have not begun are dropped.
  ~TransferPool();
  TransferPool(const TransferPool&) = delete;
  TransferPool& operator=(const TransferPool&) = delete;

  void submit(size_t bytes, Task task);
  void wait();

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable queued_, ended_;
  std::deque<std::pair<size_t, Task>> tasks_;
  size_t pending_ = 0, max_pending_;
  bool stopped_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

// Threads worth having for such work on this machine.
int transfer_threads();

// Tensors of a checkpoint → tensors of a model.
class WeightReader {
 public:
  WeightReader();
  // Fills `target` (contiguous, any device and dtype) from `stored`, which has as many elements. Where `stored` views a
  // mapped file, its bytes are read from the file straight into the target, or through staging buffers to a device: no
  // page of the mapping is touched. Returns before that is done.
  void read(const at::Tensor& stored, const at::Tensor& target);
  // Until all targets are filled; on a device, until that is queued on its current stream.
  void wait() { pool_.wait(); }

 private:
  TransferPool pool_;
};

}  // namespace martlet
