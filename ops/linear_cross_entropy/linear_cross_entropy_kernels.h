// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// loss, row_losses and grad_weight are of the dtype of the arithmetic.
struct LinearCrossEntropyForwardArgs {
  Tensor hidden;          // (..., d_model), seen as (rows, d_model)
  Tensor weight;          // (vocab_size, d_model)
  Tensor targets;         // (rows), each below vocab_size or ignored_target
  Tensor loss;            // (), written
  Tensor row_losses;      // (rows), written
  Tensor row_correct;     // (rows), u8, written
  Tensor n_targets;       // (), i64, written
  Tensor grad_hidden;     // (rows, d_model), d loss / d hidden, written; undefined if not wanted
  Tensor grad_weight;     // (vocab_size, d_model), d loss / d weight, written; undefined if not wanted
  int64_t row_block;      // 0: automatic
  int64_t divisor;        // 0: what stands in divisor_tensor, or 1 if that is less
  Tensor divisor_tensor;  // (), i64; may be n_targets, and is read when that has been written
};

struct LinearCrossEntropyBackwardArgs {
  Tensor grad_loss;                 // ()
  Tensor grad_hidden, grad_weight;  // multiplied by grad_loss; undefined if not wanted
};

void linear_cross_entropy_forward_cpu(const LinearCrossEntropyForwardArgs& args);
void linear_cross_entropy_forward_cuda(const LinearCrossEntropyForwardArgs& args);
void linear_cross_entropy_backward_cpu(const LinearCrossEntropyBackwardArgs& args);
void linear_cross_entropy_backward_cuda(const LinearCrossEntropyBackwardArgs& args);

inline constexpr Kernel<LinearCrossEntropyForwardArgs> linear_cross_entropy_forward{
    "linear_cross_entropy_forward", linear_cross_entropy_forward_cpu,
    HEADWATER_CUDA(linear_cross_entropy_forward_cuda)};
inline constexpr Kernel<LinearCrossEntropyBackwardArgs> linear_cross_entropy_backward{
    "linear_cross_entropy_backward", linear_cross_entropy_backward_cpu,
    HEADWATER_CUDA(linear_cross_entropy_backward_cuda)};

}  // namespace headwater
