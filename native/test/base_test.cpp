#include <ATen/ATen.h>

#include "check.h"
#include "core/base/fs.h"
#include "core/base/rng.h"

using namespace martlet;
using namespace martlet::test;

TEST("an AtomicFile that is committed holds what was written, under its name only") {
  const TemporaryFolder folder;
  {
    AtomicFile file(folder / "out.bin");
    file.write("one ", 4);
    EXPECT(!std::filesystem::exists(folder / "out.bin"));
    file.write("two", 3);
    file.commit();
  }
  EXPECT_EQ(read_bytes(folder / "out.bin"), "one two");
  EXPECT_EQ(folder.names().size(), 1u);
}

TEST("an AtomicFile that is not committed leaves nothing") {
  const TemporaryFolder folder;
  {
    AtomicFile file(folder / "out.bin");
    file.write("half", 4);
    EXPECT_EQ(folder.names().size(), 1u);  // the temporary file
  }
  EXPECT_EQ(folder.names().size(), 0u);
}

TEST("an AtomicFile that is not committed leaves the old file as it was") {
  const TemporaryFolder folder;
  write_bytes(folder / "out.bin", "old");
  {
    AtomicFile file(folder / "out.bin");
    file.write("new", 3);
  }
  EXPECT_EQ(read_bytes(folder / "out.bin"), "old");
  write_text_file(folder / "out.bin", "new");
  EXPECT_EQ(read_bytes(folder / "out.bin"), "new");
  EXPECT_EQ(folder.names().size(), 1u);
}

TEST("a folder that is not there, or a folder in the file's place, is ERR_MARTLET_IO with the path") {
  const TemporaryFolder folder;
  const Error absent = EXPECT_THROWS_CODE(code::kIo, AtomicFile(folder / "no/out.bin"));
  EXPECT_CONTAINS(absent.details_json(), (folder / "no/out.bin").string());
  std::filesystem::create_directory(folder / "taken");
  const Error taken = EXPECT_THROWS_CODE(code::kIo, write_text_file(folder / "taken", "x"));
  EXPECT_CONTAINS(taken.what(), (folder / "taken").string());
  EXPECT_EQ(folder.names().size(), 1u);
}

TEST("a generator gives the same numbers for the same seed, and others for another") {
  const auto draw = [](uint64_t seed) {
    at::Generator generator = make_generator(at::kCPU);
    generator.set_current_seed(seed);
    return at::empty({64}, at::kFloat).uniform_(0, 1, generator);
  };
  EXPECT_SAME(draw(7), draw(7));
  EXPECT(!at::equal(draw(7), draw(8)));
}

TEST("a generator's state brings back the numbers that followed") {
  at::Generator generator = make_generator(at::kCPU);
  generator.set_current_seed(3);
  const auto draw = [&] { return at::empty({33}, at::kFloat).normal_(0, 1, generator); };
  draw();
  const at::Tensor state = generator.get_state();
  const at::Tensor first = draw();
  EXPECT(!at::equal(first, draw()));
  generator.set_state(state);
  EXPECT_SAME(draw(), first);
}

TEST("generators do not share state") {
  at::Generator one = make_generator(at::kCPU), two = make_generator(at::kCPU);
  one.set_current_seed(5);
  two.set_current_seed(5);
  at::empty({10}, at::kFloat).uniform_(0, 1, one);
  at::Generator fresh = make_generator(at::kCPU);
  fresh.set_current_seed(5);
  EXPECT_SAME(at::empty({10}, at::kFloat).uniform_(0, 1, two), at::empty({10}, at::kFloat).uniform_(0, 1, fresh));
}

TEST("mix_seed is splitmix64") {
  // The published sequence of splitmix64 from the state 1234567: output i mixes state + (i + 1) · golden ratio.
  EXPECT_EQ(mix_seed(1234567, 0), 6457827717110365317ULL);
  EXPECT_EQ(mix_seed(1234567, 1), 3203168211198807973ULL);
  EXPECT_EQ(mix_seed(1234567, 2), 9817491932198370423ULL);
}
