// One kernel signature per operator for all devices.
#pragma once

#include "core/device.h"
#include "core/profile.h"

/// The CUDA side of a Kernel: the function's address in a build that has CUDA kernels, on hardware or emulated, else
/// null. A macro, because such a function does not exist elsewhere.
#if defined(HEADWATER_CUDA_KERNELS)
#define HEADWATER_CUDA(function) function
#else
#define HEADWATER_CUDA(function) nullptr
#endif

namespace headwater {

/// Says that this build cannot run `kernel` on a GPU, and what to do. Kind: machine.
[[noreturn]] void throw_no_cuda(const char* kernel);

/// The implementations of one kernel. Args is a plain struct of tensors and sizes, the same for all devices;
/// `cuda` is null in a build without CUDA. Calling it runs the implementation for `device` under the name
/// that profiles show.
template <class Args>
struct Kernel {
  const char* name;
  void (*cpu)(const Args&);
  void (*cuda)(const Args&) = nullptr;

  void operator()(Device device, const Args& args) const {
    ProfileScope scope(name);
    if (device.is_cpu()) {
      cpu(args);
    } else if (cuda != nullptr) {
      cuda(args);
    } else {
      throw_no_cuda(name);
    }
  }
};

}  // namespace headwater
