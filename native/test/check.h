// The tests' registry and checks. A failed check is recorded and the test goes on; a test without a failed check
// passes.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <filesystem>
#include <functional>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/error.h"

namespace martlet::test {

struct Test {
  std::string name;  // "<file without _test.cpp>/<title>"
  void (*run)();
};

// In the order of registration.
std::vector<Test>& registry();

struct Registration {
  Registration(std::string_view file, const char* title, void (*run)());
};

void record_failure(const char* file, int line, const std::string& what);

template <typename A, typename B>
void check_equal(const A& actual, const B& expected, const char* text, const char* file, int line) {
  if (actual == expected) return;
  std::ostringstream what;
  what << text << " is " << actual << ", not " << expected;
  record_failure(file, line, what.str());
}

// |actual − expected| <= tolerance everywhere; compared in float64, so NaN never passes. Shapes must be the same.
void check_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance, const char* text,
                 const char* file, int line);
void check_close(double actual, double expected, double tolerance, const char* text, const char* file, int line);
// Same dtype, shape and bits.
void check_same(const at::Tensor& actual, const at::Tensor& expected, const char* text, const char* file, int line);
void check_contains(std::string_view text, std::string_view part, const char* file, int line);

// The error that `body` throws, for checks of its message and details. Anything but a martlet::Error of that code is a
// failure.
Error expect_error(const char* code, const std::function<void()>& body, const char* text, const char* file, int line);

// An empty folder of its own, removed with everything in it at the end of the scope.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  // Names of the entries, sorted.
  std::vector<std::string> names() const;

 private:
  std::filesystem::path path_;
};

void write_bytes(const std::filesystem::path& path, std::string_view bytes);
std::string read_bytes(const std::filesystem::path& path);

// test/fixtures/engine (made by test/reference/make_engine.py).
inline std::filesystem::path fixtures() { return std::filesystem::path(MARTLET_FIXTURES) / "engine"; }

// Standard normal numbers that depend on the seed only.
at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kFloat);

}  // namespace martlet::test

#define MARTLET_JOIN_(a, b) a##b
#define MARTLET_JOIN(a, b) MARTLET_JOIN_(a, b)

// TEST("what must hold") { … }
#define TEST(title)                                                                                                \
  static void MARTLET_JOIN(test_, __LINE__)();                                                                     \
  static const ::martlet::test::Registration MARTLET_JOIN(registration_, __LINE__)(__FILE__, title,                \
                                                                                   MARTLET_JOIN(test_, __LINE__)); \
  static void MARTLET_JOIN(test_, __LINE__)()

// EXPECT, since c10's logging header takes the name CHECK.
#define EXPECT(condition) \
  ((condition) ? void() : ::martlet::test::record_failure(__FILE__, __LINE__, #condition " does not hold"))
#define EXPECT_EQ(actual, expected) ::martlet::test::check_equal((actual), (expected), #actual, __FILE__, __LINE__)
#define EXPECT_CLOSE(actual, expected, tolerance) \
  ::martlet::test::check_close((actual), (expected), (tolerance), #actual, __FILE__, __LINE__)
#define EXPECT_SAME(actual, expected) ::martlet::test::check_same((actual), (expected), #actual, __FILE__, __LINE__)
#define EXPECT_CONTAINS(text, part) ::martlet::test::check_contains((text), (part), __FILE__, __LINE__)
#define EXPECT_THROWS_CODE(code, expression) \
  ::martlet::test::expect_error((code), [&] { (void)(expression); }, #expression, __FILE__, __LINE__)
