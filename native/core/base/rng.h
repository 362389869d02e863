// Random numbers that do not depend on what was drawn before: every use has a generator seeded from what it is for.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

#include <cstdint>

namespace martlet {

at::Generator make_generator(c10::Device device);

// splitmix64 of both: spreads neighbouring values over the whole range.
uint64_t mix_seed(uint64_t seed, uint64_t value);

}  // namespace martlet
