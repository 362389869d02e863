// What a running job may ask and say: cancellation and progress events.
#pragma once

#include <atomic>
#include <functional>
#include <string>

namespace martlet {

class JobContext {
 public:
  explicit JobContext(std::function<void(std::string)> emit) : emit_(std::move(emit)) {}

  // Any thread.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  // Throws ERR_MARTLET_ABORTED when cancelled. Long loops call it at least every few hundred milliseconds.
  void check() const;
  // `event` is a JSON object as text; delivered on the JavaScript thread in order.
  void emit(std::string event) const { emit_(std::move(event)); }

 private:
  std::function<void(std::string)> emit_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace martlet
