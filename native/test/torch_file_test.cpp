#include "core/io/torch_file.h"

#include <ATen/ATen.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "check.h"
#include "core/base/job.h"
#include "core/io/checkpoint.h"
#include "core/io/safetensors.h"

using namespace martlet;
using namespace martlet::test;
using nlohmann::json;

namespace {

const std::filesystem::path kFixtures = std::filesystem::path(MARTLET_FIXTURES) / "torch";

std::string little(uint64_t value, size_t size) {
  std::string out;
  for (size_t i = 0; i < size; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}

// One entry of a zip, with every number free to lie.
struct Entry {
  std::string name, data;
  uint16_t flags = 0, method = 0;
  uint64_t size = data.size(), stored = data.size();
  std::string local_name = name;  // as the entry's own header spells it
  std::string extra = "";         // of the directory
  std::optional<uint64_t> header = std::nullopt;
};

struct Archive {
  std::string body, directory;
  size_t count = 0;

  Archive& add(Entry e) {
    const uint64_t header = e.header.value_or(body.size());
    body += little(0x04034b50, 4) + little(20, 2) + little(e.flags, 2) + little(e.method, 2) + little(0, 8) +
            little(e.stored, 4) + little(e.size, 4) + little(e.local_name.size(), 2) + little(0, 2) + e.local_name +
            e.data;
    directory += little(0x02014b50, 4) + little(20, 2) + little(20, 2) + little(e.flags, 2) + little(e.method, 2) +
                 little(0, 8) + little(std::min<uint64_t>(e.stored, 0xffffffff), 4) +
                 little(std::min<uint64_t>(e.size, 0xffffffff), 4) + little(e.name.size(), 2) +
                 little(e.extra.size(), 2) + little(0, 10) + little(std::min<uint64_t>(header, 0xffffffff), 4) +
                 e.name + e.extra;
    ++count;
    return *this;
  }
  std::string end(uint64_t entries, uint64_t size, uint64_t begin) const {
    return little(0x06054b50, 4) + little(0, 4) + little(entries, 2) + little(entries, 2) + little(size, 4) +
           little(begin, 4) + little(0, 2);
  }
  std::string bytes() const { return body + directory + end(count, directory.size(), body.size()); }
  // With a zip64 directory, whose plain one tells nothing.
  std::string bytes64() const {
    const uint64_t at = body.size() + directory.size();
    return body + directory + little(0x06064b50, 4) + little(44, 8) + little(20, 4) + little(0, 8) + little(count, 8) +
           little(count, 8) + little(directory.size(), 8) + little(body.size(), 8) + little(0x07064b50, 4) +
           little(0, 4) + little(at, 8) + little(1, 4) + end(0xffff, 0xffffffff, 0xffffffff);
  }
};

std::string text(const std::string& value) { return "X" + little(value.size(), 4) + value; }
std::string integer(int64_t value) { return "\x8a\x08" + little(static_cast<uint64_t>(value), 8); }
std::string global(const std::string& module, const std::string& name) { return "c" + module + "\n" + name + "\n"; }
std::string tuple(const std::vector<std::string>& items) {
  std::string out = "(";
  for (const std::string& item : items) out += item;
  return out + "t";
}
std::string integers(const std::vector<int64_t>& values) {
  std::vector<std::string> items;
  for (const int64_t value : values) items.push_back(integer(value));
  return tuple(items);
}
std::string call(const std::string& function, const std::vector<std::string>& arguments) {
  return function + tuple(arguments) + "R";
}
const std::string kNoHooks = global("collections", "OrderedDict") + ")R";

std::string storage(int64_t elements, const std::string& key = "0", const std::string& type = "FloatStorage") {
  return tuple({text("storage"), global("torch", type), text(key), text("cpu"), integer(elements)}) + "Q";
}
std::string tensor(int64_t elements, int64_t offset, const std::vector<int64_t>& shape,
                   const std::vector<int64_t>& strides, const std::string& key = "0") {
  return call(global("torch._utils", "_rebuild_tensor_v2"),
              {storage(elements, key), integer(offset), integers(shape), integers(strides), "\x89", kNoHooks});
}
// {"w": value}
std::string dict(const std::string& value) { return "\x80\x02}" + text("w") + value + "s."; }
const std::string kGood = dict(tensor(4, 0, {2, 2}, {2, 1}));
const std::string kFloats = std::string(reinterpret_cast<const char*>(std::array<float, 4>{1, 2, 3, 4}.data()), 16);

std::string file_of(const std::string& pickle, const std::string& data = kFloats) {
  return Archive().add({"m/data.pkl", pickle}).add({"m/data/0", data}).bytes();
}

// Opening such a file must fail with ERR_MARTLET_WEIGHTS, name the file, and say `part`.
Error check_refused(const std::string& bytes, const std::string& part, const std::string& about = "") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "pytorch_model.bin";
  write_bytes(path, bytes);
  const std::string label = about.empty() ? part : about;
  const Error error = expect_error(code::kWeights, [&] { TorchFile::open(path); }, label.c_str(), __FILE__, __LINE__);
  check_contains(error.what(), part, label.c_str(), 0);
  check_contains(json::parse(error.details_json()).value("path", ""), path.string(), label.c_str(), 0);
  check_contains(error.what(), "Download it again from its publisher, or take a safetensors copy", label.c_str(), 0);
  return error;
}
void check_pickle_refused(const std::string& pickle, const std::string& part, const std::string& about = "") {
  check_refused(file_of(pickle), part, about);
}

void check_same_tensors(const std::string& bin, const std::string& safetensors) {
  const auto file = TorchFile::open(kFixtures / bin);
  const auto expected = SafetensorsFile::open(kFixtures / safetensors);
  EXPECT_EQ(file->tensors().size(), expected->tensors().size());
  for (const TensorInfo& info : expected->tensors()) {
    EXPECT_SAME(file->tensor(info.name), expected->tensor(info.name));
    EXPECT(file->find(info.name) != nullptr && file->find(info.name)->shape == info.shape);
  }
}

}  // namespace

TEST("what torch.save wrote is read to the bit: all dtypes, views, shared storages") {
  check_same_tensors("tensors.bin", "tensors.safetensors");
}

TEST("a module's state dict with its metadata, and parameters, are read") {
  check_same_tensors("state_dict.bin", "state_dict.safetensors");
  check_same_tensors("parameters.bin", "state_dict.safetensors");
}

TEST("a tensor outlives the file object it came from") {
  const TemporaryFolder folder;
  write_bytes(folder / "m.bin", file_of(kGood));
  const at::Tensor read = TorchFile::open(folder / "m.bin")->tensor("w");
  EXPECT_SAME(read, at::tensor({1.f, 2.f, 3.f, 4.f}).view({2, 2}));
  EXPECT(!TorchFile::open(folder / "m.bin")->tensor("absent").defined());
}

TEST("torch files that are no flat dict of tensors are refused, and say why") {
  const auto refused = [](const char* name, const std::string& part) {
    const Error error =
        expect_error(code::kWeights, [&] { TorchFile::open(kFixtures / name); }, name, __FILE__, __LINE__);
    EXPECT_CONTAINS(error.what(), part);
    EXPECT_CONTAINS(error.what(), name);
  };
  refused("nested.bin", "\"model\" is no tensor");
  refused("number.bin", "\"step\" is no tensor");
  refused("list.bin", "EMPTY_LIST");
  refused("legacy.bin", "before 1.6");
  refused("protocol4.bin", "protocol 2");
  refused("float8.bin", "torch._utils._rebuild_tensor_v3");
  refused("sparse.bin", "torch._utils._rebuild_sparse_tensor");
  refused("torchscript.bin", "is compressed");
  refused("module.bin", "torch.nn.modules.container.Sequential");
}

TEST("functions that a pickle would call are refused by name, and nothing is run") {
  const TemporaryFolder folder;
  const std::string witness = (folder / "witness").string(), command = "touch " + witness;
  const std::pair<const char*, const char*> functions[] = {
      {"os", "system"},
      {"posix", "system"},
      {"nt", "system"},
      {"subprocess", "Popen"},
      {"builtins", "eval"},
      {"builtins", "exec"},
      {"__builtin__", "eval"},
      {"builtins", "__import__"},
      {"builtins", "getattr"},
      {"runpy", "_run_code"},
      {"socket", "create_connection"},
      {"webbrowser", "open"},
      {"torch", "load"},
      {"torch.hub", "load"},
      {"operator", "attrgetter"},
      {"torch._utils", "system"},
      {"torch.FloatStorage", "__reduce__"},
  };
  for (const auto& [module, name] : functions) {
    const std::string full = std::string(module) + "." + name;
    const Error error = check_refused(file_of(dict(call(global(module, name), {text(command)}))), full);
    EXPECT_EQ(json::parse(error.details_json()).value("global", ""), full);
    // The same behind an argument of an allowed function, and never called at all.
    check_pickle_refused(
        dict(call(global("collections", "OrderedDict"), {call(global(module, name), {text(command)})})), full);
    check_pickle_refused("\x80\x02" + global(module, name) + "0}" + ".", full);
  }
  EXPECT(!std::filesystem::exists(witness));
}

TEST("every opcode outside the subset is refused by its name") {
  const std::pair<std::string, const char*> opcodes[] = {
      {"\x93", "STACK_GLOBAL (0x93)"},
      {"\x81", "NEWOBJ (0x81)"},
      {"\x92", "NEWOBJ_EX (0x92)"},
      {std::string("\x82\x01"), "EXT1 (0x82)"},
      {"ios\nsystem\n", "INST (0x69)"},
      {"o", "OBJ (0x6f)"},
      {"]", "EMPTY_LIST"},
      {"0", "POP"},
      {"2", "DUP"},
      {"G12345678", "BINFLOAT"},
      {"I1\n", "INT (0x49)"},
      {"Va\n", "UNICODE (0x56)"},
      {"U\x01"
       "a",
       "SHORT_BINSTRING"},
      {"\x8c\x01"
       "a",
       "SHORT_BINUNICODE"},
      {"\x94", "MEMOIZE"},
      {"\x95" + little(0, 8), "FRAME"},
      {"\x98", "READONLY_BUFFER"},
      {"Pa\n", "PERSID"},
      {"\xff", "unknown opcode (0xff)"},
      {std::string(1, '\0'), "unknown opcode (0x00)"},
  };
  for (const auto& [bytes, name] : opcodes) check_pickle_refused(dict(bytes), name);
}

TEST("a pickle that is not one of torch.save is refused") {
  check_pickle_refused("", "cut short", "nothing");
  check_pickle_refused("\x80\x04}.", "protocol 2", "protocol 4");
  check_pickle_refused("}.", "protocol 2", "no protocol");
  check_pickle_refused("\x80\x02.", "other than one value", "an empty stack");
  check_pickle_refused("\x80\x02}}.", "other than one value", "two values");
  check_pickle_refused("\x80\x02}(.", "other than one value", "an open mark");
  check_pickle_refused("\x80\x02).", "dict of tensors", "a tuple");
  check_pickle_refused("\x80\x02}.}", "goes on after its end", "a second pickle");
  check_pickle_refused("\x80\x02R", "did not put", "a call on an empty stack");
  check_pickle_refused("\x80\x02}(s.", "did not put", "values below a mark");
  check_pickle_refused("\x80\x02t", "did not put", "a tuple without a mark");
  check_pickle_refused("\x80\x02}(" + text("w") + "u.", "key without a value");
  check_pickle_refused("\x80\x02)" + text("w") + "Ns.", "no dict", "an item of a tuple");
  check_pickle_refused("\x80\x02}q\x01h\x02.", "did not keep", "an unknown memo");
  check_pickle_refused("\x80\x02}" + ("j" + little(0xffffffff, 4)) + ".", "did not keep", "the largest memo");
  check_pickle_refused("\x80\x02})b.", "state", "a tuple for a state");
  check_pickle_refused("\x80\x02)}b.", "state", "a state for a tuple");
  check_pickle_refused(dict("Q"), "no storage", "a storage of text");
  check_pickle_refused(dict("N"), "\"w\" is no tensor");
  check_pickle_refused("\x80\x02}N" + tensor(4, 0, {4}, {1}) + "s.", "no text");
  check_pickle_refused(dict("\x8a\x09" + std::string(9, 'a')), "64 bits");
  check_pickle_refused("\x80\x02}X\xff\xff\xff\xff", "cut short", "a text of 4 GB");
  check_pickle_refused("\x80\x02}" + text("w\xff") + "Ns.", "not UTF-8", "a name of other bytes");
  check_pickle_refused("\x80\x02}c" + std::string(100000, 'a') + "\nb\n.", "without an end", "an endless name");
  check_pickle_refused(
      "\x80\x02}" + text("w") + tensor(4, 0, {4}, {1}) + "s" + text("w") + tensor(4, 0, {4}, {1}) + "s.", "twice");
}

TEST("arguments of another kind than torch.save writes are refused") {
  const std::string rebuild = global("torch._utils", "_rebuild_tensor_v2");
  const std::string s = storage(4), zero = integer(0), four = integers({4}), one = integers({1}), no = "\x89";
  const auto refused = [&](const std::vector<std::string>& arguments, const std::string& part, const char* about) {
    check_pickle_refused(dict(call(rebuild, arguments)), part, about);
  };
  refused({}, "0 arguments", "none");
  refused({s, zero, four, one, no, kNoHooks, "}"}, "7 arguments", "one too many");
  refused({zero, zero, four, one, no, kNoHooks}, "another kind", "a number for a storage");
  refused({s, four, four, one, no, kNoHooks}, "another kind", "a tuple for an offset");
  refused({s, zero, zero, one, no, kNoHooks}, "another kind", "a number for a shape");
  refused({s, zero, tuple({text("4")}), one, no, kNoHooks}, "another kind", "text for an extent");
  refused({s, zero, four, one, zero, kNoHooks}, "another kind", "a number for a bool");
  refused({s, zero, four, one, no, "}" + text("a") + "Ns"}, "backward hooks", "hooks");
  check_pickle_refused(dict(text("os") + ")R"), "no function", "a call of text");
  check_pickle_refused(dict(global("torch", "FloatStorage") + ")R"), "torch.FloatStorage", "a call of a class");
  check_pickle_refused(dict(tuple({text("storage")}) + "Q"), "no storage", "one field");
  check_pickle_refused(dict(text("0") + "Q"), "no storage", "text");
  check_pickle_refused(
      dict(tuple({text("module"), global("torch", "FloatStorage"), text("0"), text("cpu"), integer(4)}) + "Q"),
      "no storage", "a module");
  check_pickle_refused(
      dict(tuple({text("storage"), global("collections", "OrderedDict"), text("0"), text("cpu"), integer(4)}) + "Q"),
      "no storage", "a dict for a class");
}

TEST("tensors that do not fit their storage are refused, by name") {
  const auto refused = [](int64_t elements, int64_t offset, const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& strides, const char* about) {
    const Error error = check_refused(file_of(dict(tensor(elements, offset, shape, strides))), "tensor w", about);
    EXPECT_EQ(json::parse(error.details_json()).value("tensor", ""), "w");
  };
  const int64_t huge = std::numeric_limits<int64_t>::max(), half = int64_t{1} << 62;
  refused(5, 0, {4}, {1}, "a storage larger than the file's");
  refused(3, 0, {3}, {1}, "a storage smaller than the file's");
  refused(-4, 0, {4}, {1}, "a negative storage");
  refused(huge, 0, {4}, {1}, "a storage of 2^63 - 1");
  refused(int64_t{1} << 62, 0, {4}, {1}, "a storage whose bytes overflow");
  refused(4, 0, {5}, {1}, "one element too many");
  refused(4, 1, {4}, {1}, "an offset that pushes past the end");
  refused(4, -1, {4}, {1}, "a negative offset");
  refused(4, huge, {1}, {1}, "the largest offset");
  refused(4, 5, {0}, {1}, "nothing, past the end");
  refused(4, 0, {-4}, {1}, "a negative extent");
  refused(4, 0, {2, 2}, {-1, 1}, "a negative stride");
  refused(4, 0, {2, 2}, {3, 1}, "a stride that leaves");
  refused(4, 0, {2, 2}, {huge, 1}, "the largest stride");
  refused(4, 3, {2, 2}, {half, half}, "strides whose sum overflows");
  refused(4, 0, {int64_t{1} << 40}, {0}, "a stride of zero: 4 TB out of 16 bytes");
  refused(4, 0, {half, 4}, {0, 0}, "extents whose product overflows");
  refused(4, 0, {0, half, half}, {1, 1, 1}, "no elements, endless extents");
  refused(4, 0, {4}, {1, 1}, "more strides than extents");
  refused(4, 0, std::vector<int64_t>(65, 1), std::vector<int64_t>(65, 1), "65 dimensions");
  for (const char* key : {"1", "../0", "/etc/passwd", "../../../../etc/passwd", "", "0/", "data/0"}) {
    check_pickle_refused(dict(tensor(4, 0, {4}, {1}, key)), "which is not there", key);
  }
}

TEST("what a small pickle may take of memory has a bound") {
  // A billion laughs: tuples of tuples, by the memo. No copy is made.
  std::string laughs = "\x80\x02}" + text("w") + ")q" + std::string(1, '\0');
  for (int i = 0; i < 200; ++i)
    laughs += "(" + std::string("h\0h\0h\0h\0h\0h\0h\0h\0", 16) + "tq" + std::string(1, '\0');
  check_pickle_refused(laughs + ".", "other than one value", "billion laughs");
  check_pickle_refused("\x80\x02" + std::string(3 << 20, '}') + ".", "more than a checkpoint holds", "many dicts");
  check_pickle_refused("\x80\x02" + std::string(3 << 20, '(') + ".", "more than a checkpoint holds", "many marks");
  std::string same = "\x80\x02}q\x01";
  for (int i = 0; i < 3 << 20; ++i) same += "h\x01";
  check_pickle_refused(same + ".", "more than a checkpoint holds", "one value many times");
  // Nesting that would overflow the stack of whoever walks it.
  check_pickle_refused("\x80\x02}" + text("w") + ")" + std::string(1 << 20, '\x85') + "s.", "\"w\" is no tensor",
                       "deep");
  // A dict that holds itself.
  check_pickle_refused("\x80\x02}q\x01" + text("w") + "h\x01s.", "\"w\" is no tensor", "a cycle");
  check_refused(file_of(std::string(40 << 20, '}')), "its pickle has", "a pickle of 40 MB");
}

TEST("zip archives that lie, hide or repeat are refused") {
  const Entry pickle{"m/data.pkl", kGood}, data{"m/data/0", kFloats};
  const auto with = [&](Entry changed) { return Archive().add(pickle).add(std::move(changed)).bytes(); };
  check_refused("", "no directory", "an empty file");
  check_refused("PK", "no directory", "two bytes");
  check_refused(std::string(1000, 'x'), "no directory", "other bytes");
  check_refused(file_of(kGood) + "x", "no directory", "bytes behind the end");
  check_refused(with({"m/data/0", kFloats, 0, 8}), "is compressed", "deflate");
  check_refused(with({.name = "m/data/0", .data = kFloats, .method = 8, .size = uint64_t{1} << 31}), "is compressed",
                "a zip bomb");
  check_refused(with({"m/data/0", kFloats, 1, 0}), "is encrypted");
  check_refused(with({.name = "m/data/0", .data = kFloats, .size = 17}), "two sizes");
  check_refused(with({.name = "m/data/0", .data = kFloats, .size = 999, .stored = 999}), "does not have",
                "a size too large");
  check_refused(with({.name = "m/data/0", .data = kFloats, .size = 0xfffffffe, .stored = 0xfffffffe}), "does not have",
                "4 GB");
  check_refused(with({.name = "m/data/0", .data = kFloats, .size = ~uint64_t{0}, .stored = ~uint64_t{0}}),
                "zip64 sizes");
  const std::string wrap = little(1, 2) + little(16, 2) + little(~uint64_t{0}, 8) + little(~uint64_t{0}, 8);
  check_refused(
      with({.name = "m/data/0", .data = kFloats, .size = ~uint64_t{0}, .stored = ~uint64_t{0}, .extra = wrap}),
      "does not have", "a zip64 size of 2^64 - 1");
  check_refused(with({.name = "m/data/0",
                      .data = kFloats,
                      .size = ~uint64_t{0},
                      .stored = ~uint64_t{0},
                      .extra = little(1, 2) + little(40, 2)}),
                "zip64 sizes", "a zip64 field longer than its place");
  check_refused(with({.name = "m/data/0",
                      .data = kFloats,
                      .size = ~uint64_t{0},
                      .stored = ~uint64_t{0},
                      .extra = little(9, 2) + little(0xffff, 2)}),
                "zip64 sizes", "another field longer than its place");
  check_refused(with({.name = "m/data/0", .data = kFloats, .local_name = "m/data/1"}), "says otherwise", "two names");
  check_refused(with({.name = "m/data/0", .data = kFloats, .header = 0}), "says otherwise", "another entry's header");
  check_refused(with({.name = "m/data/0", .data = kFloats, .header = 0xfffffff0}), "before the directory",
                "a header past the end");
  for (const char* name : {"../m/data/0", "/etc/passwd", "m/../../x", "m\\data", "m//x", "./x", "m/..", "..", ""}) {
    check_refused(with({name, kFloats}), "unsafe name", name);
  }
  check_refused(with({std::string("m/a\0b", 5), kFloats}), "unsafe name", "a NUL in a name");
  check_refused(with(pickle), "is there twice", "two pickles");
  check_refused(with({"other/data/0", kFloats}), "folder of the others");
  check_refused(Archive().add(data).bytes(), "no data.pkl");
  check_refused(Archive().add(pickle).add(data).add({"m/byteorder", "big"}).bytes(), "big-endian");
  // Entries that share bytes: much data out of a small file.
  Archive overlap = Archive().add(pickle).add(data);
  const uint64_t at = overlap.body.size() - 16 - 8 - 30;
  const std::string body = overlap.body;
  overlap.add({.name = "m/data/0x", .data = kFloats, .header = at});
  overlap.body = body;
  check_refused(overlap.bytes(), "says otherwise", "overlapping entries");
  Archive within;
  const std::string inner = Archive().add({"m/data/1", kFloats}).body;
  within.add(pickle).add({"m/data/0", inner});
  const uint64_t begin = within.body.size() - inner.size();
  const std::string outer = within.body;
  within.add({.name = "m/data/1", .data = kFloats, .header = begin});
  within.body = outer;
  check_refused(within.bytes(), "lies over", "an entry inside another");

  const Archive good = Archive().add(pickle).add(data);
  check_refused(good.body + good.directory + good.end(3, good.directory.size(), good.body.size()), "claims 3");
  check_refused(good.body + good.directory + good.end(1, good.directory.size(), good.body.size()), "describe no entry");
  check_refused(good.body + good.directory + good.end(0xffff, good.directory.size(), good.body.size()), "claims 65535");
  check_refused(good.body + good.directory + good.end(2, 0xffffffff, 0xffffffff), "past its place");
  check_refused(good.body + good.directory + good.end(2, good.directory.size(), 0), "where it claims");
}

TEST("zip64 directories and sizes are read") {
  const TemporaryFolder folder;
  Archive archive;
  archive.add({"m/data.pkl", kGood});
  const std::string extra = little(7, 2) + little(2, 2) + "ab" + little(1, 2) + little(24, 2) + little(16, 8) +
                            little(16, 8) + little(archive.body.size(), 8);
  const uint64_t full = ~uint64_t{0};
  Entry data{.name = "m/data/0", .data = kFloats, .size = full, .stored = full, .extra = extra};
  // The entry's own header keeps its true place; the directory says "see zip64" for all three numbers.
  archive.add(data);
  std::string& directory = archive.directory;
  const size_t last = directory.rfind(little(0x02014b50, 4));
  directory.replace(last + 42, 4, little(0xffffffff, 4));
  write_bytes(folder / "m.bin", archive.bytes64());
  EXPECT_SAME(TorchFile::open(folder / "m.bin")->tensor("w"), at::tensor({1.f, 2.f, 3.f, 4.f}).view({2, 2}));
  std::string moved = archive.bytes64();
  moved.replace(moved.size() - 22 - 12, 8, little(~uint64_t{0} - 20, 8));
  check_refused(moved, "past the end", "a zip64 directory elsewhere");
}

TEST("a file cut anywhere is refused") {
  const TemporaryFolder folder;
  for (const char* name : {"tensors.bin", "state_dict.bin"}) {
    const std::string whole = read_bytes(kFixtures / name);
    int opened = 0;
    for (size_t size = 0; size < whole.size(); ++size) {
      write_bytes(folder / "cut.bin", std::string_view(whole).substr(0, size));
      try {
        TorchFile::open(folder / "cut.bin");
        ++opened;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), code::kWeights);
      }
    }
    EXPECT_EQ(opened, 0);
  }
}

TEST("whatever byte is changed, the file is refused or its tensors can be read") {
  const TemporaryFolder folder;
  const std::string whole = read_bytes(kFixtures / "tensors.bin");
  std::srand(7);
  int refused = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    std::string changed = whole;
    changed[i] = static_cast<char>(i % 3 == 0 ? changed[i] ^ (1 << (i % 8)) : std::rand());
    write_bytes(folder / "changed.bin", changed);
    try {
      const auto file = TorchFile::open(folder / "changed.bin");
      for (const TensorInfo& info : file->tensors()) file->tensor(info.name).contiguous();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code::kWeights);
      ++refused;
    }
  }
  EXPECT(refused > 1000);
}

TEST("what is not a file is refused") {
  const TemporaryFolder folder;
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, TorchFile::open(folder / "absent")).what(), "absent");
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, TorchFile::open(folder.path())).what(), "not a regular file");
}

TEST("a checkpoint of .bin shards is read through its index, and converted to safetensors") {
  const TemporaryFolder folder, out;
  std::filesystem::copy_file(kFixtures / "tensors.bin", folder / "pytorch_model-00001-of-00002.bin");
  std::filesystem::copy_file(kFixtures / "state_dict.bin", folder / "pytorch_model-00002-of-00002.bin");
  const auto first = SafetensorsFile::open(kFixtures / "tensors.safetensors"),
             second = SafetensorsFile::open(kFixtures / "state_dict.safetensors");
  json map = json::object();
  for (const TensorInfo& info : first->tensors()) map[info.name] = "pytorch_model-00001-of-00002.bin";
  for (const TensorInfo& info : second->tensors()) map[info.name] = "pytorch_model-00002-of-00002.bin";
  write_bytes(folder / "pytorch_model.bin.index.json", json{{"weight_map", map}}.dump());

  const auto check = [&](const Checkpoint& checkpoint) {
    EXPECT_EQ(checkpoint.names().size(), first->tensors().size() + second->tensors().size());
    for (const SafetensorsFile* file : {first.get(), second.get()}) {
      for (const TensorInfo& info : file->tensors()) EXPECT_SAME(checkpoint.tensor(info.name), file->tensor(info.name));
    }
  };
  check(Checkpoint::open(folder.path()));
  std::vector<std::string> events;
  JobContext job([&](std::string event) { events.push_back(std::move(event)); });
  const json report = convert_checkpoint_json(
      {{"modelDir", folder.path().string()}, {"outputDir", out.path().string()}, {"maxShardSize", 200}}, job);
  EXPECT_EQ(report.at("tensors").get<size_t>(), map.size());
  EXPECT(report.at("shards").size() > 1);
  EXPECT_EQ(events.size(), map.size());
  check(Checkpoint::open(out.path()));

  job.cancel();
  EXPECT_THROWS_CODE(
      code::kAborted,
      convert_checkpoint_json(
          {{"modelDir", folder.path().string()}, {"outputDir", out.path().string()}, {"maxShardSize", 200}}, job));
  map["layer.9"] = "pytorch_model-00002-of-00002.bin";
  write_bytes(folder / "pytorch_model.bin.index.json", json{{"weight_map", map}}.dump());
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, Checkpoint::open(folder.path())).what(), "layer.9");
  std::filesystem::remove(folder / "pytorch_model-00002-of-00002.bin");
  EXPECT_CONTAINS(EXPECT_THROWS_CODE(code::kWeights, Checkpoint::open(folder.path())).what(), "is missing");
}

TEST("safetensors go before .bin; a single pytorch_model.bin is read") {
  const TemporaryFolder folder;
  std::filesystem::copy_file(kFixtures / "tensors.bin", folder / "pytorch_model.bin");
  EXPECT(Checkpoint::open(folder.path()).tensor("plain").defined());
  std::filesystem::copy_file(kFixtures / "state_dict.safetensors", folder / "model.safetensors");
  EXPECT_EQ(Checkpoint::open(folder.path()).names().size(), 4u);
}
