// Private to the operator: what its kernel takes, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// x and y share a dtype; rotation and row_scale are of the dtype of the arithmetic.
struct RotaryArgs {
  Tensor x;          // (batch, length, n_heads, d)
  Tensor rotation;   // (batch, length, d / 2, 2)
  Tensor row_scale;  // (batch, length, n_heads) or undefined
  Tensor y;          // like x, written
  double factor;
  bool backwards;  // by the negative angles
};

void rotary_cpu(const RotaryArgs& args);
void rotary_cuda(const RotaryArgs& args);

inline constexpr Kernel<RotaryArgs> rotary_kernel{"rotary", rotary_cpu, HEADWATER_CUDA(rotary_cuda)};

}  // namespace headwater
