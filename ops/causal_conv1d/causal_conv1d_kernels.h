// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// weight, bias and their gradients are of the dtype of the arithmetic.
struct CausalConv1dForwardArgs {
  Tensor x;              // (batch, length, channels)
  Tensor weight;         // (channels, d_conv)
  Tensor bias;           // (channels) or undefined
  Tensor initial_state;  // (batch, rows, channels) or undefined
  Tensor resets;         // i32 (batch, length) or undefined
  Tensor y;              // (batch, length, channels), written
  Tensor final_state;    // (batch, state_length, channels), written
  bool silu;
};

struct CausalConv1dBackwardArgs {
  Tensor x, weight, bias, initial_state, resets;  // as in the forward
  Tensor grad_y;                                  // (batch, length, channels)
  Tensor grad_final_state;                        // (batch, state_length, channels) or undefined
  Tensor grad_x;                                  // (batch, length, channels), written
  Tensor grad_initial_state;                      // like initial_state, written; undefined without one
  Tensor grad_weight;                             // (channels, d_conv), written or added to
  Tensor grad_bias;                               // (channels), written or added to; undefined without bias
  bool accumulate_weight, accumulate_bias;
  bool silu;
};

void causal_conv1d_forward_cpu(const CausalConv1dForwardArgs& args);
void causal_conv1d_forward_cuda(const CausalConv1dForwardArgs& args);
void causal_conv1d_backward_cpu(const CausalConv1dBackwardArgs& args);
void causal_conv1d_backward_cuda(const CausalConv1dBackwardArgs& args);

inline constexpr Kernel<CausalConv1dForwardArgs> causal_conv1d_forward{
    "causal_conv1d_forward", causal_conv1d_forward_cpu, HEADWATER_CUDA(causal_conv1d_forward_cuda)};
inline constexpr Kernel<CausalConv1dBackwardArgs> causal_conv1d_backward{
    "causal_conv1d_backward", causal_conv1d_backward_cpu, HEADWATER_CUDA(causal_conv1d_backward_cuda)};

}  // namespace headwater
