// What torch.save pickles of a dict of tensors, read without running anything. Pickle is a program for a stack machine
// that may call any Python function; this reader knows the few instructions that describe dicts, tuples, numbers, text
// and tensors, and refuses every other one by its name.
#pragma once

#include <c10/core/ScalarType.h>

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace martlet {

// A tensor as the pickle describes it. Its numbers are not checked against anything yet.
struct PickledTensor {
  std::string name;     // its key in the dict
  std::string storage;  // name of the entry that holds its bytes
  at::ScalarType dtype = at::kFloat;
  int64_t storage_elements = 0, offset = 0;  // in elements
  std::vector<int64_t> shape, strides;
};

// `broken` is called with what is wrong, and with details for the error (opcode, global, tensor); it must throw.
std::vector<PickledTensor> read_pickled_tensors(
    std::string_view bytes, const std::function<void(const std::string&, const nlohmann::json&)>& broken);

}  // namespace martlet
