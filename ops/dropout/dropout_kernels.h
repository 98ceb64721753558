// Private to the operator: what its kernel takes, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"
#include "ops/dropout/dropout.h"

namespace headwater {

/// Forward and backward are the same: what is dropped and scaled is x in one and the gradient of y in the
/// other.
struct DropoutArgs {
  Tensor x;
  Tensor y;  // written
  double drop_prob;
  DropoutKey key;
};

void dropout_mask_cpu(const DropoutArgs& args);
void dropout_mask_cuda(const DropoutArgs& args);

inline constexpr Kernel<DropoutArgs> dropout_mask{"dropout_mask", dropout_mask_cpu,
                                                  HEADWATER_CUDA(dropout_mask_cuda)};

}  // namespace headwater
