// Private to the operator: what its kernel takes, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// x and y share a dtype; rotation and row_scale are of the dtype of the arithmetic.
struct RotatePairsArgs {
  Tensor x;          // (batch, length, n_heads, d)
  Tensor rotation;   // (batch, length, d / 2, 2)
  Tensor row_scale;  // (batch, length, n_heads) or undefined
  Tensor y;          // like x, written
  double factor;
  bool backwards;  // by the negative angles
};

void rotate_pairs_cpu(const RotatePairsArgs& args);
void rotate_pairs_cuda(const RotatePairsArgs& args);

inline constexpr Kernel<RotatePairsArgs> rotate_pairs_kernel{"rotate_pairs", rotate_pairs_cpu,
                                                             HEADWATER_CUDA(rotate_pairs_cuda)};

}  // namespace headwater
