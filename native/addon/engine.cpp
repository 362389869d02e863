#include "addon/engine.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/base/error.h"
#include "core/session.h"

namespace martlet {
namespace {

// A job on its way through the engine. The parts that touch JavaScript (promise, references) are used on the JavaScript
// thread only.
struct Job {
  Job(Napi::Env env, std::string method_name, std::string args_json)
      : method(std::move(method_name)),
        args(std::move(args_json)),
        deferred(Napi::Promise::Deferred::New(env)),
        context([this](std::string event) { post_event(std::move(event)); }) {}

  void post_event(std::string event);

  std::string method, args;
  std::vector<BufferView> buffers;
  std::vector<Napi::ObjectReference> kept;  // keeps the buffers' memory
  Napi::Promise::Deferred deferred;
  std::optional<Napi::FunctionReference> on_event;
  Napi::ThreadSafeFunction to_js;
  JobContext context;
  Reply reply;
  std::optional<Error> error;
};

using JobPtr = std::shared_ptr<Job>;

void Job::post_event(std::string event) {
  if (!on_event) return;
  auto* text = new std::string(std::move(event));
  const napi_status status = to_js.NonBlockingCall(text, [this](Napi::Env env, Napi::Function, std::string* data) {
    const std::unique_ptr<std::string> owned(data);
    if (env == nullptr) return;
    Napi::HandleScope scope(env);
    try {
      on_event->Call({Napi::String::New(env, *owned)});
    } catch (const Napi::Error&) {
      // A listener's own error must not take the job down; lib/native/engine.ts does not throw here.
    }
  });
  if (status != napi_ok) delete text;
}

Napi::Value error_value(Napi::Env env, const Error& error) {
  Napi::Error value = Napi::Error::New(env, error.what());
  value.Set("code", Napi::String::New(env, error.code()));
  value.Set("details", Napi::String::New(env, error.details_json()));
  return value.Value();
}

void settle(Napi::Env env, Job& job) {
  Napi::HandleScope scope(env);
  if (job.error) {
    job.deferred.Reject(error_value(env, *job.error));
  } else {
    Napi::Object result = Napi::Object::New(env);
    Napi::Array buffers = Napi::Array::New(env, job.reply.buffers.size());
    for (size_t i = 0; i < job.reply.buffers.size(); ++i) {
      const std::vector<uint8_t>& bytes = job.reply.buffers[i];
      Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(env, bytes.size());
      if (!bytes.empty()) std::memcpy(buffer.Data(), bytes.data(), bytes.size());
      buffers.Set(static_cast<uint32_t>(i), buffer);
    }
    result.Set("result", Napi::String::New(env, job.reply.result));
    result.Set("buffers", buffers);
    job.deferred.Resolve(result);
  }
  job.kept.clear();
  job.on_event.reset();
}

}  // namespace

class EngineState {
 public:
  EngineState() : thread_([this] { run(); }) {}

  ~EngineState() { stop(); }

  // False when the engine is closed.
  bool push(JobPtr job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (closing_) return false;
      queue_.push_back(std::move(job));
    }
    wake_.notify_one();
    return true;
  }

  // Cancels everything; the thread ends soon after.
  void request_stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      if (running_) running_->context.cancel();
      for (const JobPtr& job : queue_) job->context.cancel();
    }
    wake_.notify_one();
  }

  void join() {
    const std::lock_guard<std::mutex> lock(join_mutex_);
    if (thread_.joinable()) thread_.join();
  }

  void stop() {
    request_stop();
    join();
  }

 private:
  void run() {
    auto session = std::make_unique<Session>();
    while (true) {
      JobPtr job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        running_.reset();
        wake_.wait(lock, [this] { return closing_ || !queue_.empty(); });
        if (queue_.empty()) break;
        job = std::move(queue_.front());
        queue_.pop_front();
        running_ = job;
      }
      try {
        job->context.check();
        job->reply = session->handle(job->method, job->args, job->buffers, job->context);
      } catch (...) {
        job->error = current_exception_as_error();
      }
      finish(std::move(job));
    }
    session.reset();  // on the thread that made it
  }

  // Hands the job back to the JavaScript thread. If the environment is going down, nobody waits for it any more.
  static void finish(JobPtr job) {
    Napi::ThreadSafeFunction to_js = job->to_js;
    auto* owned = new JobPtr(std::move(job));
    const napi_status status = to_js.BlockingCall(owned, [](Napi::Env env, Napi::Function, JobPtr* data) {
      if (env == nullptr) return;  // shutting down: see below
      const std::unique_ptr<JobPtr> holder(data);
      settle(env, **holder);
    });
    // A job that cannot be delivered because the environment is going down is leaked on purpose: its references to
    // JavaScript objects may be touched neither off the JavaScript thread nor after the environment.
    (void)status;
    to_js.Release();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<JobPtr> queue_;
  JobPtr running_;
  bool closing_ = false;
  std::mutex join_mutex_;
  std::thread thread_;  // last: starts when all else is there
};

Napi::Function Engine::define(Napi::Env env) {
  return DefineClass(env, "Engine",
                     {InstanceMethod("submit", &Engine::submit), InstanceMethod("close", &Engine::close)});
}

Engine::Engine(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<Engine>(info), state_(std::make_shared<EngineState>()) {
  auto* data = info.Env().GetInstanceData<EnvironmentData>();
  std::erase_if(data->engines, [](const std::weak_ptr<EngineState>& engine) { return engine.expired(); });
  data->engines.push_back(state_);
}

// submit(method, args, buffers, onEvent?) → { promise, cancel }
Napi::Value Engine::submit(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 3 || !info[0].IsString() || !info[1].IsString() || !info[2].IsArray()) {
    throw Napi::TypeError::New(env, "submit(method, args, buffers, onEvent?)");
  }
  auto job = std::make_shared<Job>(env, info[0].As<Napi::String>().Utf8Value(), info[1].As<Napi::String>().Utf8Value());
  const Napi::Array buffers = info[2].As<Napi::Array>();
  for (uint32_t i = 0; i < buffers.Length(); ++i) {
    const Napi::Value value = buffers.Get(i);
    if (!value.IsTypedArray()) throw Napi::TypeError::New(env, "buffers must be typed arrays");
    const Napi::TypedArray array = value.As<Napi::TypedArray>();
    const auto* base = static_cast<const uint8_t*>(array.ArrayBuffer().Data());
    job->buffers.push_back({base + array.ByteOffset(), array.ByteLength()});
    job->kept.push_back(Napi::Persistent(static_cast<Napi::Object>(array)));
  }
  if (info.Length() > 3 && info[3].IsFunction()) job->on_event = Napi::Persistent(info[3].As<Napi::Function>());
  // Holds the event loop until the job is settled; an engine without jobs holds nothing.
  job->to_js = Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}),
                                             "martlet job", 0, 1);

  Napi::Object out = Napi::Object::New(env);
  out.Set("promise", job->deferred.Promise());
  const std::weak_ptr<Job> weak = job;
  out.Set("cancel", Napi::Function::New(env, [weak](const Napi::CallbackInfo&) {
            if (const JobPtr alive = weak.lock()) alive->context.cancel();
          }));
  if (!state_->push(job)) {
    job->error.emplace(code::kDisposed, "The engine is closed.");
    settle(env, *job);
    job->to_js.Release();
  }
  return out;
}

namespace {

// Joins the engine's thread on a libuv worker: the only place that may wait for a running operation to notice the
// cancellation.
class CloseWorker : public Napi::AsyncWorker {
 public:
  CloseWorker(Napi::Env env, std::shared_ptr<EngineState> state)
      : Napi::AsyncWorker(env), state_(std::move(state)), deferred_(Napi::Promise::Deferred::New(env)) {}
  void Execute() override { state_->join(); }
  void OnOK() override { deferred_.Resolve(Env().Undefined()); }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }
  Napi::Promise promise() const { return deferred_.Promise(); }

 private:
  std::shared_ptr<EngineState> state_;
  Napi::Promise::Deferred deferred_;
};

}  // namespace

Napi::Value Engine::close(const Napi::CallbackInfo& info) {
  state_->request_stop();
  auto* worker = new CloseWorker(info.Env(), state_);
  const Napi::Promise promise = worker->promise();
  worker->Queue();
  return promise;
}

// Called once when the environment (main thread or worker) goes down.
void stop_engines(EnvironmentData* data) {
  for (const std::weak_ptr<EngineState>& weak : data->engines) {
    if (const auto state = weak.lock()) state->request_stop();
  }
  for (const std::weak_ptr<EngineState>& weak : data->engines) {
    if (const auto state = weak.lock()) state->join();
  }
}

}  // namespace martlet
