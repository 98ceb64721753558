// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// Steps from one saved state to the next. On a CPU, what is computed again of 16 channels and 16 states each stays in
/// the second-level cache; on a GPU a thread keeps a stretch in registers.
inline constexpr int64_t selective_scan_stretch_cpu = 64;
inline constexpr int64_t selective_scan_stretch_cuda = 8;

/// x, dt, B, C, z, y and their gradients share a dtype; all else is of the dtype of the arithmetic.
struct SelectiveScanForwardArgs {
  Tensor x, dt;          // (batch, length, d_inner)
  Tensor A;              // (d_inner, d_state)
  Tensor B, C;           // (batch, length, n_groups, d_state)
  Tensor D;              // (d_inner) or undefined
  Tensor z;              // (batch, length, d_inner) or undefined
  Tensor dt_bias;        // (d_inner) or undefined
  Tensor initial_state;  // (batch, d_inner, d_state) or undefined
  Tensor resets;         // i32 (batch, length) or undefined
  Tensor y;              // (batch, length, d_inner), written
  Tensor final_state;    // (batch, d_inner, d_state), written
  Tensor
      saved_states;  // (batch, stretches, d_state, d_inner), written: the state before each; undefined if not wanted
  bool softplus;
};

struct SelectiveScanBackwardArgs {
  SelectiveScanForwardArgs forward;  // with saved_states, and without y and final_state
  Tensor grad_y;                     // (batch, length, d_inner)
  Tensor grad_final_state;           // (batch, d_inner, d_state) or undefined
  Tensor grad_x, grad_dt;            // (batch, length, d_inner), written
  Tensor grad_B, grad_C;             // (batch, length, n_groups, d_state), written
  Tensor grad_z;                     // (batch, length, d_inner), written; undefined without z
  // Written; undefined if not wanted:
  Tensor grad_A;              // (d_inner, d_state)
  Tensor grad_D;              // (d_inner)
  Tensor grad_dt_bias;        // (d_inner)
  Tensor grad_initial_state;  // (batch, d_inner, d_state)
};

void selective_scan_forward_cpu(const SelectiveScanForwardArgs& args);
void selective_scan_forward_cuda(const SelectiveScanForwardArgs& args);
void selective_scan_backward_cpu(const SelectiveScanBackwardArgs& args);
void selective_scan_backward_cuda(const SelectiveScanBackwardArgs& args);

inline constexpr Kernel<SelectiveScanForwardArgs> selective_scan_forward{
    "selective_scan_forward", selective_scan_forward_cpu, HEADWATER_CUDA(selective_scan_forward_cuda)};
inline constexpr Kernel<SelectiveScanBackwardArgs> selective_scan_backward{
    "selective_scan_backward", selective_scan_backward_cpu, HEADWATER_CUDA(selective_scan_backward_cuda)};

}  // namespace headwater
