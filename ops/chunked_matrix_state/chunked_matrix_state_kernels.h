// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// q, k, v, y and their gradients share a dtype; everything else is of the dtype of the arithmetic.
struct MatrixStateForwardArgs {
  Tensor q, k;           // (batch, length, n_groups, d_key)
  Tensor v;              // (batch, length, n_heads, d_value)
  Tensor log_decay;      // undefined, (n_heads) or (batch, length, n_heads)
  Tensor value_scale;    // undefined or (batch, length, n_heads)
  Tensor skip;           // undefined, (n_heads) or (n_heads, d_value)
  Tensor initial_state;  // undefined or (batch, n_heads, d_key, d_value)
  Tensor resets;         // undefined or i32 (batch, length)
  Tensor y;              // (batch, length, n_heads, d_value), written by the forward
  Tensor final_state;    // (batch, n_heads, d_key, d_value), written by the forward
  int64_t chunk_len;
};

/// Every defined gradient has the shape of what it belongs to and is written (not added to).
struct MatrixStateBackwardArgs {
  MatrixStateForwardArgs forward;  // its y and final_state are not read
  Tensor grad_y;                   // (batch, length, n_heads, d_value)
  Tensor grad_final_state;         // undefined (zero) or (batch, n_heads, d_key, d_value)
  Tensor grad_q, grad_k, grad_v;
  Tensor grad_log_decay, grad_value_scale, grad_skip, grad_initial_state;  // undefined where the input is
};

void chunked_matrix_state_forward_cpu(const MatrixStateForwardArgs& args);
void chunked_matrix_state_forward_cuda(const MatrixStateForwardArgs& args);
void chunked_matrix_state_backward_cpu(const MatrixStateBackwardArgs& args);
void chunked_matrix_state_backward_cuda(const MatrixStateBackwardArgs& args);
void recurrent_matrix_state_forward_cpu(const MatrixStateForwardArgs& args);
void recurrent_matrix_state_forward_cuda(const MatrixStateForwardArgs& args);
void recurrent_matrix_state_backward_cpu(const MatrixStateBackwardArgs& args);
void recurrent_matrix_state_backward_cuda(const MatrixStateBackwardArgs& args);

inline constexpr Kernel<MatrixStateForwardArgs> chunked_matrix_state_forward{
    "chunked_matrix_state_forward", chunked_matrix_state_forward_cpu,
    HEADWATER_CUDA(chunked_matrix_state_forward_cuda)};
inline constexpr Kernel<MatrixStateBackwardArgs> chunked_matrix_state_backward{
    "chunked_matrix_state_backward", chunked_matrix_state_backward_cpu,
    HEADWATER_CUDA(chunked_matrix_state_backward_cuda)};
inline constexpr Kernel<MatrixStateForwardArgs> recurrent_matrix_state_forward{
    "recurrent_matrix_state_forward", recurrent_matrix_state_forward_cpu,
    HEADWATER_CUDA(recurrent_matrix_state_forward_cuda)};
inline constexpr Kernel<MatrixStateBackwardArgs> recurrent_matrix_state_backward{
    "recurrent_matrix_state_backward", recurrent_matrix_state_backward_cpu,
    HEADWATER_CUDA(recurrent_matrix_state_backward_cuda)};

}  // namespace headwater
