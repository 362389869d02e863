#include "core/io/pickle.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>

namespace martlet {
namespace {

using nlohmann::json;
using Broken = std::function<void(const std::string&, const json&)>;

// Python's Lib/pickletools.py. Those up to kStop are understood.
enum Opcode : uint8_t {
  kProto = 0x80,
  kEmptyDict = '}',
  kEmptyTuple = ')',
  kMark = '(',
  kTuple = 't',
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kBinUnicode = 'X',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kLong1 = 0x8a,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kNone = 'N',
  kGlobal = 'c',
  kReduce = 'R',
  kBuild = 'b',
  kBinPersId = 'Q',
  kSetItem = 's',
  kSetItems = 'u',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kStop = '.',
};

constexpr std::pair<uint8_t, const char*> kRefused[] = {
    {'0', "POP"},
    {'1', "POP_MARK"},
    {'2', "DUP"},
    {'F', "FLOAT"},
    {'G', "BINFLOAT"},
    {'I', "INT"},
    {'L', "LONG"},
    {'P', "PERSID"},
    {'S', "STRING"},
    {'T', "BINSTRING"},
    {'U', "SHORT_BINSTRING"},
    {'V', "UNICODE"},
    {'B', "BINBYTES"},
    {'C', "SHORT_BINBYTES"},
    {']', "EMPTY_LIST"},
    {'a', "APPEND"},
    {'d', "DICT"},
    {'e', "APPENDS"},
    {'g', "GET"},
    {'i', "INST"},
    {'l', "LIST"},
    {'o', "OBJ"},
    {'p', "PUT"},
    {0x81, "NEWOBJ"},
    {0x82, "EXT1"},
    {0x83, "EXT2"},
    {0x84, "EXT4"},
    {0x8b, "LONG4"},
    {0x8c, "SHORT_BINUNICODE"},
    {0x8d, "BINUNICODE8"},
    {0x8e, "BINBYTES8"},
    {0x8f, "EMPTY_SET"},
    {0x90, "ADDITEMS"},
    {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"},
    {0x93, "STACK_GLOBAL"},
    {0x94, "MEMOIZE"},
    {0x95, "FRAME"},
    {0x96, "BYTEARRAY8"},
    {0x97, "NEXT_BUFFER"},
    {0x98, "READONLY_BUFFER"},
};

constexpr const char* kOrderedDict = "collections.OrderedDict";
constexpr const char* kRebuildTensor = "torch._utils._rebuild_tensor_v2";
constexpr const char* kRebuildParameter = "torch._utils._rebuild_parameter";

constexpr std::pair<const char*, at::ScalarType> kStorages[] = {
    {"torch.FloatStorage", at::kFloat},   {"torch.HalfStorage", at::kHalf}, {"torch.BFloat16Storage", at::kBFloat16},
    {"torch.DoubleStorage", at::kDouble}, {"torch.LongStorage", at::kLong}, {"torch.IntStorage", at::kInt},
    {"torch.ShortStorage", at::kShort},   {"torch.CharStorage", at::kChar}, {"torch.ByteStorage", at::kByte},
    {"torch.BoolStorage", at::kBool},
};

// A pickle can make a value with one byte: bounds the memory that a hostile one takes. A tensor needs about twelve.
constexpr size_t kMaxValues = size_t{1} << 21;
constexpr size_t kMaxName = 1000;

struct Value {
  enum Kind { kNothing, kBool, kInt, kText, kTupleOf, kDict, kFunction, kStorage, kTensor } kind = kNothing;
  int64_t number = 0;  // kBool, kInt; kStorage: elements
  std::string text;    // kText; kFunction: module.name; kStorage: its entry
  std::vector<const Value*>
      items;  // kTupleOf; kDict: key, value, key, value, …; kTensor: storage, offset, shape, strides
  at::ScalarType dtype = at::kFloat;  // kStorage
};

class Machine {
 public:
  Machine(std::string_view bytes, const Broken& broken) : bytes_(bytes), report_(broken) {}

  std::vector<PickledTensor> run();

 private:
  [[noreturn]] void broken(const std::string& what, json details = json::object()) const {
    details["byte"] = at_;
    report_(what, details);
    std::abort();  // report_ throws
  }

  std::string_view take(size_t size) {
    if (size > bytes_.size() - at_) broken("its pickle is cut short");
    at_ += size;
    return bytes_.substr(at_ - size, size);
  }
  uint64_t number(size_t size) {
    const std::string_view raw = take(size);
    uint64_t value = 0;
    for (size_t i = size; i-- > 0;) value = value << 8 | static_cast<uint8_t>(raw[i]);
    return value;
  }
  std::string line() {
    const size_t end = bytes_.find('\n', at_);
    if (end == bytes_.npos || end - at_ > kMaxName) broken("its pickle names a function without an end");
    std::string out(take(end - at_));
    ++at_;
    return out;
  }

  Value& fresh(Value::Kind kind) {
    if (values_.size() >= kMaxValues) broken("its pickle describes more than a checkpoint holds");
    values_.emplace_back().kind = kind;
    return values_.back();
  }
  Value& push(Value::Kind kind) {
    Value& value = fresh(kind);
    push(value);
    return value;
  }
  void push(Value& value) {
    if (stack_.size() >= kMaxValues) broken("its pickle describes more than a checkpoint holds");
    stack_.push_back(&value);
  }
  // Never reaches below the last mark.
  Value& pop() {
    if (stack_.size() <= floor()) broken("its pickle takes a value that it did not put");
    Value* value = stack_.back();
    stack_.pop_back();
    return *value;
  }
  Value& top() {
    Value& value = pop();
    stack_.push_back(&value);
    return value;
  }
  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  std::vector<const Value*> pop_to_mark() {
    if (marks_.empty()) broken("its pickle goes back to a mark that it did not put");
    std::vector<const Value*> out(stack_.begin() + static_cast<std::ptrdiff_t>(floor()), stack_.end());
    stack_.resize(floor());
    marks_.pop_back();
    return out;
  }

  void step(uint8_t opcode);
  void tuple(std::vector<const Value*> items) { push(Value::kTupleOf).items = std::move(items); }
  void tuple_of_last(size_t count) {
    std::vector<const Value*> items(count);
    for (size_t i = count; i-- > 0;) items[i] = &pop();
    tuple(std::move(items));
  }
  void set_items(const std::vector<const Value*>& items) {
    Value& dict = top();
    if (dict.kind != Value::kDict) broken("its pickle puts an item into something that is no dict");
    if (items.size() % 2 != 0) broken("its pickle puts a key without a value");
    dict.items.insert(dict.items.end(), items.begin(), items.end());
  }
  void global();
  void storage();
  void reduce();
  const Value& argument(const std::vector<const Value*>& items, size_t i, Value::Kind kind, const char* function) {
    if (items[i]->kind != kind) {
      broken("its pickle calls " + std::string(function) + " with an argument of another kind than torch.save writes",
             {{"global", function}});
    }
    return *items[i];
  }
  std::vector<int64_t> integers(const Value& tuple, const char* function) {
    std::vector<int64_t> out;
    for (size_t i = 0; i < tuple.items.size(); ++i) {
      out.push_back(argument(tuple.items, i, Value::kInt, function).number);
    }
    return out;
  }

  std::string_view bytes_;
  const Broken& report_;
  size_t at_ = 0;
  // Owns all values, so that neither a cycle nor deep nesting can hurt when they are freed.
  std::deque<Value> values_;
  std::vector<Value*> stack_;
  std::vector<size_t> marks_;  // heights of the stack
  std::unordered_map<uint64_t, Value*> memo_;
};

void Machine::global() {
  const std::string module = line(), name = module + "." + line();
  const bool known =
      name == kOrderedDict || name == kRebuildTensor || name == kRebuildParameter ||
      std::any_of(std::begin(kStorages), std::end(kStorages), [&](const auto& entry) { return name == entry.first; });
  if (!known) {
    broken("its pickle asks for " + name + ", which no dict of tensors needs; nothing was run", {{"global", name}});
  }
  push(Value::kFunction).text = name;
}

// ('storage', class, entry, device, elements)
void Machine::storage() {
  constexpr const char* kAbout = "a storage";
  const Value& id = pop();
  if (id.kind != Value::kTupleOf || id.items.size() != 5) broken("its pickle refers to something that is no storage");
  const std::string& type = argument(id.items, 1, Value::kFunction, kAbout).text;
  const auto* known =
      std::find_if(std::begin(kStorages), std::end(kStorages), [&](const auto& entry) { return type == entry.first; });
  if (argument(id.items, 0, Value::kText, kAbout).text != "storage" || known == std::end(kStorages)) {
    broken("its pickle refers to something that is no storage");
  }
  Value& out = push(Value::kStorage);
  out.dtype = known->second;
  out.text = argument(id.items, 2, Value::kText, kAbout).text;
  argument(id.items, 3, Value::kText, kAbout);
  out.number = argument(id.items, 4, Value::kInt, kAbout).number;
}

void Machine::reduce() {
  const Value& arguments = pop();
  const Value& function = pop();
  if (function.kind != Value::kFunction || arguments.kind != Value::kTupleOf) {
    broken("its pickle calls something that is no function");
  }
  const std::vector<const Value*>& items = arguments.items;
  const char* name = function.text.c_str();
  const auto hooks = [&](size_t i) {
    if (!argument(items, i, Value::kDict, name).items.empty()) broken("its pickle gives a tensor backward hooks");
  };
  if (function.text == kOrderedDict && items.empty()) {
    push(Value::kDict);
  } else if (function.text == kRebuildTensor && items.size() == 6) {
    argument(items, 0, Value::kStorage, name);
    argument(items, 1, Value::kInt, name);
    argument(items, 2, Value::kTupleOf, name);
    argument(items, 3, Value::kTupleOf, name);
    argument(items, 4, Value::kBool, name);
    hooks(5);
    push(Value::kTensor).items = {items[0], items[1], items[2], items[3]};
  } else if (function.text == kRebuildParameter && items.size() == 3) {
    push(Value::kTensor).items = argument(items, 0, Value::kTensor, name).items;
    argument(items, 1, Value::kBool, name);
    hooks(2);
  } else {
    broken("its pickle calls " + function.text + " with " + std::to_string(items.size()) +
               " arguments, which torch.save never writes",
           {{"global", function.text}});
  }
}

// Names become JSON, which takes nothing else.
bool is_utf8(const std::string& text) {
  try {
    (void)json(text).dump();
    return true;
  } catch (const json::type_error&) {
    return false;
  }
}

void Machine::step(uint8_t opcode) {
  switch (opcode) {
    case kEmptyDict:
      push(Value::kDict);
      break;
    case kEmptyTuple:
      tuple({});
      break;
    case kMark:
      if (marks_.size() >= kMaxValues) broken("its pickle describes more than a checkpoint holds");
      marks_.push_back(stack_.size());
      break;
    case kTuple:
      tuple(pop_to_mark());
      break;
    case kTuple1:
    case kTuple2:
    case kTuple3:
      tuple_of_last(opcode - kTuple1 + size_t{1});
      break;
    case kBinUnicode: {
      const size_t size = number(4);
      push(Value::kText).text = take(size);
      if (!is_utf8(top().text)) broken("its pickle holds a text that is not UTF-8");
      break;
    }
    case kBinInt:
      push(Value::kInt).number = static_cast<int32_t>(number(4));
      break;
    case kBinInt1:
      push(Value::kInt).number = static_cast<int64_t>(number(1));
      break;
    case kBinInt2:
      push(Value::kInt).number = static_cast<int64_t>(number(2));
      break;
    case kLong1: {
      const size_t size = number(1);
      if (size > 8) broken("its pickle holds a number of more than 64 bits");
      uint64_t value = number(size);
      // Two's complement, as short as it can be.
      if (size > 0 && size < 8 && value >> (8 * size - 1)) value |= ~uint64_t{0} << (8 * size);
      push(Value::kInt).number = static_cast<int64_t>(value);
      break;
    }
    case kNewTrue:
    case kNewFalse:
      push(Value::kBool).number = opcode == kNewTrue;
      break;
    case kNone:
      push(Value::kNothing);
      break;
    case kGlobal:
      global();
      break;
    case kReduce:
      reduce();
      break;
    case kBuild:
      // A state dict carries `_metadata`, the versions of its modules.
      if (pop().kind != Value::kDict || top().kind != Value::kDict) {
        broken("its pickle gives a state to something that is no dict");
      }
      break;
    case kBinPersId:
      storage();
      break;
    case kSetItem: {
      const Value& value = pop();
      const Value& key = pop();
      set_items({&key, &value});
      break;
    }
    case kSetItems:
      set_items(pop_to_mark());
      break;
    case kBinPut:
    case kLongBinPut:
      memo_[number(opcode == kBinPut ? 1 : 4)] = &top();
      break;
    case kBinGet:
    case kLongBinGet: {
      const auto it = memo_.find(number(opcode == kBinGet ? 1 : 4));
      if (it == memo_.end()) broken("its pickle takes a value that it did not keep");
      push(*it->second);
      break;
    }
    default: {
      const auto* known = std::find_if(std::begin(kRefused), std::end(kRefused),
                                       [&](const auto& entry) { return entry.first == opcode; });
      char code[8];
      std::snprintf(code, sizeof code, "0x%02x", opcode);
      const std::string name = known == std::end(kRefused) ? "unknown opcode" : known->second;
      broken("its pickle uses " + name + " (" + code + "), which torch.save does not write for a dict of tensors",
             {{"opcode", known == std::end(kRefused) ? code : name}});
    }
  }
}

std::vector<PickledTensor> Machine::run() {
  if (number(1) != kProto || number(1) != 2) broken("its pickle is not of protocol 2, which torch.save writes");
  while (true) {
    const auto opcode = static_cast<uint8_t>(number(1));
    if (opcode == kStop) break;
    step(opcode);
  }
  if (!marks_.empty() || stack_.size() != 1) broken("its pickle ends with other than one value");
  if (at_ != bytes_.size()) broken("its pickle goes on after its end");
  const Value& dict = *stack_.front();
  if (dict.kind != Value::kDict) broken("it does not hold a dict of tensors");
  std::vector<PickledTensor> out;
  out.reserve(dict.items.size() / 2);
  for (size_t i = 0; i < dict.items.size(); i += 2) {
    const Value &key = *dict.items[i], &value = *dict.items[i + 1];
    if (key.kind != Value::kText) broken("its dict has a key that is no text");
    if (value.kind != Value::kTensor) {
      broken("its entry \"" + key.text + "\" is no tensor (a flat dict of tensors is needed)", {{"tensor", key.text}});
    }
    const Value& storage = *value.items[0];
    out.push_back({key.text, storage.text, storage.dtype, storage.number, value.items[1]->number,
                   integers(*value.items[2], kRebuildTensor), integers(*value.items[3], kRebuildTensor)});
  }
  return out;
}

}  // namespace

std::vector<PickledTensor> read_pickled_tensors(std::string_view bytes, const Broken& broken) {
  return Machine(bytes, broken).run();
}

}  // namespace martlet
