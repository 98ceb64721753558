// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// All of one dtype, but that on a GPU x and grad_x may be bf16, the others then being f32.
struct StepSizeForwardArgs {
  Tensor x;              // (rows, n_heads)
  Tensor A;              // (n_heads)
  Tensor dt_bias;        // (n_heads) or undefined
  Tensor dt, log_decay;  // (rows, n_heads), written
  bool softplus;
  double lower, upper;  // infinite where there is no limit
};

struct StepSizeBackwardArgs {
  StepSizeForwardArgs forward;  // its dt and log_decay are not read
  Tensor grad_dt;               // (rows, n_heads) or undefined
  Tensor grad_log_decay;        // (rows, n_heads) or undefined
  Tensor grad_x;                // (rows, n_heads), written
  Tensor grad_A;                // (n_heads), written
  Tensor grad_dt_bias;          // (n_heads), written; undefined without dt_bias
};

void step_size_forward_cpu(const StepSizeForwardArgs& args);
void step_size_forward_cuda(const StepSizeForwardArgs& args);
void step_size_backward_cpu(const StepSizeBackwardArgs& args);
void step_size_backward_cuda(const StepSizeBackwardArgs& args);

inline constexpr Kernel<StepSizeForwardArgs> step_size_forward{"step_size_forward", step_size_forward_cpu,
                                                               HEADWATER_CUDA(step_size_forward_cuda)};
inline constexpr Kernel<StepSizeBackwardArgs> step_size_backward{"step_size_backward", step_size_backward_cpu,
                                                                 HEADWATER_CUDA(step_size_backward_cuda)};

}  // namespace headwater
