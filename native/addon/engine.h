// The engine object of JavaScript: one thread, one queue of jobs, one Session that lives on that thread.
#pragma once

#include <napi.h>

#include <memory>

namespace martlet {

class EngineState;

class Engine : public Napi::ObjectWrap<Engine> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Engine(const Napi::CallbackInfo& info);

 private:
  Napi::Value submit(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<EngineState> state_;
};

// Kept in the environment's instance data. One cleanup hook for all engines of the environment: a hook per object would
// outlive objects that were collected, and abort at exit.
struct EnvironmentData {
  Napi::FunctionReference engine_class;
  std::vector<std::weak_ptr<EngineState>> engines;
};

}  // namespace martlet
