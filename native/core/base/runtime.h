// Devices and libraries of the process.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace martlet {

// auto | cpu | cuda | cuda:N. `auto` is the first CUDA device, else the CPU. A CUDA device that is absent is
// ERR_MARTLET_CUDA_UNAVAILABLE, saying whether the libraries, the driver or the device is missing.
c10::Device parse_device(const std::string& name);

// libtorch's threads in operations on host memory, for the calling thread: those of ThreadCounts.
void use_threads(c10::Device device);

// Same bits from the same calls, or an error from an operator that cannot. For the whole process; not while another
// thread reads the environment.
void set_deterministic(bool on);

}  // namespace martlet
