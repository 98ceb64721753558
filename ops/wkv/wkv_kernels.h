// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// k, v, y and their gradients are of one dtype; all else but the resets is of the dtype of the arithmetic.
/// n_stretches = length / wkv_stretch, rounded up. A state is two rows: the average, the logarithm of the weight.
struct WkvForwardArgs {
  Tensor k, v;                    // (batch, length, channels)
  Tensor time_decay, time_first;  // (channels)
  Tensor initial_state;           // (batch, 2, channels) or undefined
  Tensor resets;                  // i32 (batch, length) or undefined
  Tensor y;                       // (batch, length, channels), written
  Tensor final_state;             // (batch, 2, channels), written
  Tensor borders;                 // (batch, n_stretches, 2, channels), written: the state before each stretch
};

struct WkvBackwardArgs {
  Tensor k, v, time_decay, time_first, resets;  // as in the forward
  Tensor borders;                               // as the forward wrote them
  Tensor grad_y;                                // (batch, length, channels) or undefined
  Tensor grad_final_state;                      // (batch, 2, channels) or undefined
  Tensor grad_k, grad_v;                        // (batch, length, channels), written
  Tensor grad_initial_state;                    // (batch, 2, channels), written; undefined without one
  Tensor grad_time_decay, grad_time_first;      // (channels), written or added to; may be undefined
  bool accumulate_decay, accumulate_first;
};

void wkv_forward_cpu(const WkvForwardArgs& args);
void wkv_forward_cuda(const WkvForwardArgs& args);
void wkv_backward_cpu(const WkvBackwardArgs& args);
void wkv_backward_cuda(const WkvBackwardArgs& args);

inline constexpr Kernel<WkvForwardArgs> wkv_forward{"wkv_forward", wkv_forward_cpu,
                                                    HEADWATER_CUDA(wkv_forward_cuda)};
inline constexpr Kernel<WkvBackwardArgs> wkv_backward{"wkv_backward", wkv_backward_cpu,
                                                      HEADWATER_CUDA(wkv_backward_cuda)};

}  // namespace headwater
