// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// gate, y and their gradients share a dtype; weight, its gradient and inverse_rms are of the dtype of the arithmetic.
struct RmsNormForwardArgs {
  Tensor x;            // (rows, d)
  Tensor weight;       // (d)
  Tensor gate;         // (rows, d) or undefined
  Tensor y;            // (rows, d), written
  Tensor inverse_rms;  // (rows, n_groups), written
  double epsilon;
  bool norm_before_gate;
};

struct RmsNormBackwardArgs {
  Tensor x, weight, gate, inverse_rms;  // as in the forward
  Tensor grad_y;                        // (rows, d)
  Tensor grad_x;                        // (rows, d), written
  Tensor grad_gate;                     // (rows, d), written; undefined without a gate
  Tensor grad_weight;                   // (d), written or added to; undefined if not wanted
  bool accumulate_weight;
  bool norm_before_gate;
};

void rms_norm_forward_cpu(const RmsNormForwardArgs& args);
void rms_norm_forward_cuda(const RmsNormForwardArgs& args);
void rms_norm_backward_cpu(const RmsNormBackwardArgs& args);
void rms_norm_backward_cuda(const RmsNormBackwardArgs& args);

inline constexpr Kernel<RmsNormForwardArgs> rms_norm_forward{"rms_norm_forward", rms_norm_forward_cpu,
                                                             HEADWATER_CUDA(rms_norm_forward_cuda)};
inline constexpr Kernel<RmsNormBackwardArgs> rms_norm_backward{"rms_norm_backward", rms_norm_backward_cpu,
                                                               HEADWATER_CUDA(rms_norm_backward_cuda)};

}  // namespace headwater
