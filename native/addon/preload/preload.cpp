// dlopen for JavaScript: `load(path)` opens a shared library for the whole process and returns the error text, or an
// empty string. process.dlopen cannot do this: Node closes a library again that is no addon.
#include <dlfcn.h>
#include <node_api.h>

#include <string>

namespace {

napi_value load(napi_env env, napi_callback_info info) {
  size_t count = 1;
  napi_value argument;
  if (napi_get_cb_info(env, info, &count, &argument, nullptr, nullptr) != napi_ok || count < 1) return nullptr;
  size_t length = 0;
  if (napi_get_value_string_utf8(env, argument, nullptr, 0, &length) != napi_ok) {
    napi_throw_type_error(env, nullptr, "load(path) takes a string");
    return nullptr;
  }
  std::string path(length, '\0');
  napi_get_value_string_utf8(env, argument, path.data(), length + 1, &length);
  const char* error = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr ? "" : dlerror();
  napi_value result;
  napi_create_string_utf8(env, error, NAPI_AUTO_LENGTH, &result);
  return result;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) napi_value napi_register_module_v1(napi_env env, napi_value exports) {
  napi_value function;
  napi_create_function(env, "load", NAPI_AUTO_LENGTH, load, nullptr, &function);
  napi_set_named_property(env, exports, "load", function);
  return exports;
}

extern "C" __attribute__((visibility("default"))) int32_t node_api_module_get_api_version_v1() { return 9; }
