// Private to the operator: what its kernel takes, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct RotaryArgs {
  Tensor x;          // (batch, length, n_heads, head_dim)
  Tensor positions;  // i32 (batch, length)
  Tensor y;          // as x, written
  int64_t dim;
  double base;
  bool interleaved;
  bool backwards;  // by the opposite angle: what the gradient needs
};

void rotary_cpu(const RotaryArgs& args);
void rotary_cuda(const RotaryArgs& args);

inline constexpr Kernel<RotaryArgs> rotary_kernel{"rotary", rotary_cpu, HEADWATER_CUDA(rotary_cuda)};

}  // namespace headwater
