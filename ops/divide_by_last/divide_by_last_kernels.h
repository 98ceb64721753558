// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// All of one dtype.
struct DivideByLastForwardArgs {
  Tensor x;  // (rows, d + 1)
  Tensor y;  // (rows, d), written
  double epsilon;
};

struct DivideByLastBackwardArgs {
  Tensor x;       // (rows, d + 1)
  Tensor grad_y;  // (rows, d)
  Tensor grad_x;  // (rows, d + 1), written
  double epsilon;
};

void divide_by_last_forward_cpu(const DivideByLastForwardArgs& args);
void divide_by_last_forward_cuda(const DivideByLastForwardArgs& args);
void divide_by_last_backward_cpu(const DivideByLastBackwardArgs& args);
void divide_by_last_backward_cuda(const DivideByLastBackwardArgs& args);

inline constexpr Kernel<DivideByLastForwardArgs> divide_by_last_forward{
    "divide_by_last_forward", divide_by_last_forward_cpu, HEADWATER_CUDA(divide_by_last_forward_cuda)};
inline constexpr Kernel<DivideByLastBackwardArgs> divide_by_last_backward{
    "divide_by_last_backward", divide_by_last_backward_cpu, HEADWATER_CUDA(divide_by_last_backward_cuda)};

}  // namespace headwater
