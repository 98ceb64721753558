// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// bias and the gradients of weight and bias are of the dtype of the arithmetic.
struct LinearForwardArgs {
  Tensor x;       // (rows, d_in)
  Tensor weight;  // (d_out, d_in)
  Tensor bias;    // (d_out) or undefined
  Tensor y;       // (rows, d_out), written
};

/// Each gradient is written, or added to where its accumulate flag says so; an undefined one is not wanted.
struct LinearBackwardArgs {
  Tensor x, weight, grad_y;
  Tensor grad_x, grad_weight, grad_bias;
  bool accumulate_x, accumulate_weight, accumulate_bias;
};

void linear_forward_cpu(const LinearForwardArgs& args);
void linear_forward_cuda(const LinearForwardArgs& args);
void linear_backward_cpu(const LinearBackwardArgs& args);
void linear_backward_cuda(const LinearBackwardArgs& args);

inline constexpr Kernel<LinearForwardArgs> linear_forward{"linear_forward", linear_forward_cpu,
                                                          HEADWATER_CUDA(linear_forward_cuda)};
inline constexpr Kernel<LinearBackwardArgs> linear_backward{"linear_backward", linear_backward_cpu,
                                                            HEADWATER_CUDA(linear_backward_cuda)};

}  // namespace headwater
