// Devices and libraries of the process.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace martlet {

// auto | cpu | cuda | cuda:N. `auto` is the first CUDA device, else the CPU. A CUDA device that is absent is
// ERR_MARTLET_CUDA_UNAVAILABLE, saying whether the libraries, the driver or the device is missing.
c10::Device parse_device(const std::string& name);

}  // namespace martlet
