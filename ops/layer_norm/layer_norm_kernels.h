// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// weight, bias, their gradients, mean and inverse_std are of the dtype of the arithmetic.
struct LayerNormForwardArgs {
  Tensor x;                  // (rows, d)
  Tensor weight, bias;       // (d)
  Tensor y;                  // (rows, d), written
  Tensor mean, inverse_std;  // (rows), written
  double epsilon;
};

struct LayerNormBackwardArgs {
  Tensor x, weight, mean, inverse_std;  // as in the forward
  Tensor grad_y;                        // (rows, d)
  Tensor grad_x;                        // (rows, d), written
  Tensor grad_weight, grad_bias;        // (d), written or added to; undefined if not wanted
  bool accumulate_weight, accumulate_bias;
};

void layer_norm_forward_cpu(const LayerNormForwardArgs& args);
void layer_norm_forward_cuda(const LayerNormForwardArgs& args);
void layer_norm_backward_cpu(const LayerNormBackwardArgs& args);
void layer_norm_backward_cuda(const LayerNormBackwardArgs& args);

inline constexpr Kernel<LayerNormForwardArgs> layer_norm_forward{"layer_norm_forward", layer_norm_forward_cpu,
                                                                 HEADWATER_CUDA(layer_norm_forward_cuda)};
inline constexpr Kernel<LayerNormBackwardArgs> layer_norm_backward{
    "layer_norm_backward", layer_norm_backward_cpu, HEADWATER_CUDA(layer_norm_backward_cuda)};

}  // namespace headwater
