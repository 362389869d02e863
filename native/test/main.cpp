// martlet_tests [part of a name]: runs every test, or those whose name contains the argument.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "check.h"
#include "core/base/rng.h"

namespace martlet::test {
namespace {

int failures_of_test = 0;

}  // namespace

std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

Registration::Registration(std::string_view file, const char* title, void (*run)()) {
  std::string group = std::filesystem::path(file).stem().string();
  group.resize(group.rfind("_test"));
  registry().push_back({group + "/" + title, run});
}

void record_failure(const char* file, int line, const std::string& what) {
  ++failures_of_test;
  std::printf("  %s:%d: %s\n", std::filesystem::path(file).filename().c_str(), line, what.c_str());
}

void check_close(double actual, double expected, double tolerance, const char* text, const char* file, int line) {
  if (std::abs(actual - expected) <= tolerance) return;
  std::ostringstream what;
  what.precision(17);
  what << text << " is " << actual << ", not " << expected << " (tolerance " << tolerance << ")";
  record_failure(file, line, what.str());
}

void check_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance, const char* text,
                 const char* file, int line) {
  std::ostringstream what;
  if (!actual.defined() || !expected.defined()) {
    what << text << ": a tensor is undefined";
  } else if (actual.sizes() != expected.sizes()) {
    what << text << " has the shape " << actual.sizes() << ", not " << expected.sizes();
  } else if (actual.numel() > 0) {
    const double distance = (actual.to(at::kDouble) - expected.to(at::kDouble)).abs().max().item<double>();
    if (distance <= tolerance) return;
    what << text << " is " << distance << " away (tolerance " << tolerance << ")";
  } else {
    return;
  }
  record_failure(file, line, what.str());
}

void check_same(const at::Tensor& actual, const at::Tensor& expected, const char* text, const char* file, int line) {
  if (!actual.defined() || !expected.defined() || actual.scalar_type() != expected.scalar_type()) {
    return record_failure(file, line, std::string(text) + " is undefined or of another dtype");
  }
  check_close(actual, expected, 0.0, text, file, line);
}

void check_contains(std::string_view text, std::string_view part, const char* file, int line) {
  if (text.find(part) != std::string_view::npos) return;
  record_failure(file, line, "\"" + std::string(text) + "\" does not contain \"" + std::string(part) + "\"");
}

Error expect_error(const char* code, const std::function<void()>& body, const char* text, const char* file, int line) {
  try {
    body();
  } catch (const Error& error) {
    check_equal(error.code(), code, text, file, line);
    return error;
  } catch (const std::exception& error) {
    record_failure(file, line, std::string(text) + " throws something else: " + error.what());
    return Error(code::kInternal, "");
  }
  record_failure(file, line, std::string(text) + " does not throw");
  return Error(code::kInternal, "");
}

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "martlet-test-XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("Cannot create " + pattern);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ec;
  std::filesystem::remove_all(path_, ec);
}

std::vector<std::string> TemporaryFolder::names() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path_)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

void write_bytes(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream stream(path, std::ios::binary);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  stream.close();
  if (!stream) throw std::runtime_error("Cannot write " + path.string());
}

std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("Cannot read " + path.string());
  return {std::istreambuf_iterator<char>(stream), {}};
}

at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype) {
  at::Generator generator = make_generator(at::kCPU);
  generator.set_current_seed(seed);
  return at::empty(shape, at::kFloat).normal_(0, 1, generator).to(dtype);
}

namespace {

// True if no check failed.
bool passes(const Test& test) {
  failures_of_test = 0;
  try {
    test.run();
  } catch (...) {
    record_failure("", 0, "throws " + std::string(current_exception_as_error().what()));
  }
  return failures_of_test == 0;
}

int run(std::string_view filter) {
  int ran = 0, failed = 0;
  for (const Test& test : registry()) {
    if (test.name.find(filter) == std::string::npos) continue;
    const auto start = std::chrono::steady_clock::now();
    const bool ok = passes(test);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    std::printf("%s %s (%.0f ms)\n", ok ? "ok    " : "FAILED", test.name.c_str(), took.count());
    std::fflush(stdout);
    ++ran;
    failed += !ok;
  }
  std::printf("%d tests, %d failed\n", ran, failed);
  // A filter that matches nothing must not look like success.
  return ran > 0 && failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace martlet::test

int main(int argc, char** argv) { return martlet::test::run(argc > 1 ? argv[1] : ""); }
