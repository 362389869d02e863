#include "core/io/transfer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "core/io/mapped_file.h"

namespace martlet {

at::Tensor StagingBuffers::next(size_t bytes, at::Device device) {
  last_ = 1 - last_;
  Slot& slot = slots_[last_];
  if (slot.copied) slot.copied->synchronize();
  if (!slot.memory.defined() || (!device.is_cpu() && !slot.pinned)) {
    slot.pinned = !device.is_cpu();
    slot.memory = at::empty({static_cast<int64_t>(kTransferBlock)},
                            at::TensorOptions().dtype(at::kByte).pinned_memory(slot.pinned));
  }
  return slot.memory.narrow(0, 0, static_cast<int64_t>(bytes));
}

void StagingBuffers::in_use(at::Device device) {
  if (device.is_cpu()) return;
  std::optional<c10::Event>& copied = slots_[last_].copied;
  if (!copied) copied.emplace(device.type());
  copied->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

void StagingBuffers::wait(at::Device device) {
  in_use(device);
  if (slots_[last_].copied) slots_[last_].copied->synchronize();
}

TransferPool::TransferPool(int threads, size_t max_pending) : max_pending_(max_pending) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

TransferPool::~TransferPool() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  queued_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void TransferPool::submit(size_t bytes, Task task) {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [&] { return error_ || pending_ == 0 || pending_ + bytes <= max_pending_; });
  if (error_) std::rethrow_exception(error_);
  pending_ += bytes;
  tasks_.emplace_back(bytes, std::move(task));
  queued_.notify_one();
}

void TransferPool::wait() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [&] { return error_ || pending_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void TransferPool::work() {
  const at::NoGradGuard no_grad;
  StagingBuffers buffers;
  std::unique_lock lock(mutex_);
  for (;;) {
    queued_.wait(lock, [&] { return stopped_ || !tasks_.empty(); });
    if (stopped_) return;
    auto [bytes, task] = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      task(buffers);
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;  // lets go of its tensors before others are let in
    lock.lock();
    pending_ -= bytes;
    if (error) {
      if (!error_) error_ = error;
      stopped_ = true;
      queued_.notify_all();
    }
    ended_.notify_all();
  }
}

int transfer_threads() { return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 2u, 8u)); }

WeightReader::WeightReader() : pool_(transfer_threads(), size_t{256} << 20) {}

void WeightReader::read(const at::Tensor& stored, const at::Tensor& target) {
  const MappedFile* file = stored.is_contiguous() ? MappedFile::of(stored) : nullptr;
  const bool converts = stored.scalar_type() != target.scalar_type();
  // Conversion on the CPU is left to ATen, which has threads of its own for it.
  if (file == nullptr || (converts && target.is_cpu())) {
    target.copy_(stored.reshape(target.sizes()));
    return;
  }
  const size_t begin = file->offset_of(stored), item = stored.element_size();
  const at::Tensor flat = target.view({-1});
  const int64_t elements = flat.numel(), block = static_cast<int64_t>(kTransferBlock / item);
  for (int64_t start = 0; start < elements; start += block) {
    const int64_t count = std::min(block, elements - start);
    const size_t offset = begin + static_cast<size_t>(start) * item, bytes = static_cast<size_t>(count) * item;
    pool_.submit(bytes, [=, source = stored](StagingBuffers& buffers) {
      const at::Tensor part = flat.narrow(0, start, count);
      if (part.is_cpu()) {
        file->read(part.mutable_data_ptr(), offset, bytes);
        return;
      }
      const at::Tensor host = buffers.next(bytes, part.device());
      file->read(host.mutable_data_ptr(), offset, bytes);
      const at::Tensor values = host.view(source.scalar_type());
      if (converts) {
        part.copy_(values.to(part.device(), source.scalar_type(), /*non_blocking=*/true));
      } else {
        part.copy_(values, /*non_blocking=*/true);
      }
      buffers.in_use(part.device());
    });
  }
}

}  // namespace martlet
