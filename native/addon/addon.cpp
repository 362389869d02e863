// Entry point: what `martlet.node` exports (see Addon in lib/native/binding.ts).
#include <napi.h>

#include "addon/engine.h"
#include "core/base/error.h"
#include "core/session.h"

namespace martlet {

void stop_engines(EnvironmentData* data);

namespace {

Napi::Value initialize(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object options = info[0].As<Napi::Object>();
  try {
    initialize_runtime(
        options.Get("libtorchLib").As<Napi::String>().Utf8Value(), options.Get("cuda").ToBoolean(),
        {options.Get("threads").ToNumber().Int32Value(), options.Get("threadsBesideGpu").ToNumber().Int32Value()});
  } catch (const std::exception& e) {
    throw Napi::Error::New(env, e.what());
  }
  return env.Undefined();
}

Napi::Value system_info(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), system_info_json()); }

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new EnvironmentData();
  env.SetInstanceData(data);
  env.AddCleanupHook(stop_engines, data);
  exports.Set("compiledTorchVersion", Napi::String::New(env, compiled_torch_version()));
  exports.Set("initialize", Napi::Function::New(env, initialize, "initialize"));
  exports.Set("systemInfo", Napi::Function::New(env, system_info, "systemInfo"));
  const Napi::Function engine = Engine::define(env);
  data->engine_class = Napi::Persistent(engine);
  exports.Set("Engine", engine);
  return exports;
}

}  // namespace
}  // namespace martlet

static Napi::Object init_martlet(Napi::Env env, Napi::Object exports) { return martlet::init(env, exports); }
NODE_API_MODULE(martlet, init_martlet)
