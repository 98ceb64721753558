// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include <array>

#include "core/kernel.h"
#include "core/tensor.h"
#include "ops/token_shift/token_shift.h"

namespace headwater {

/// One tensor for each mix; those from n_mixes on are undefined.
using TokenShiftTensors = std::array<Tensor, token_shift_max_mixes>;

/// The mixes and their gradients are of the dtype of the arithmetic.
struct TokenShiftForwardArgs {
  Tensor x;                 // (batch, length, channels)
  TokenShiftTensors mixes;  // (channels)
  Tensor initial_state;     // (batch, channels) or undefined
  Tensor resets;            // i32 (batch, length) or undefined
  TokenShiftTensors y;      // (batch, length, channels), written
  Tensor final_state;       // (batch, channels), written
  int n_mixes;
};

struct TokenShiftBackwardArgs {
  Tensor x;                      // as in the forward
  TokenShiftTensors mixes;       // as in the forward
  Tensor initial_state, resets;  // as in the forward
  TokenShiftTensors grad_y;      // (batch, length, channels); undefined where it is 0
  Tensor grad_final_state;       // (batch, channels) or undefined
  Tensor grad_x;                 // (batch, length, channels), written
  Tensor grad_initial_state;     // (batch, channels), written; undefined without one
  TokenShiftTensors grad_mixes;  // (channels), written or added to; may be undefined
  std::array<bool, token_shift_max_mixes> accumulate;
  int n_mixes;
};

void token_shift_forward_cpu(const TokenShiftForwardArgs& args);
void token_shift_forward_cuda(const TokenShiftForwardArgs& args);
void token_shift_backward_cpu(const TokenShiftBackwardArgs& args);
void token_shift_backward_cuda(const TokenShiftBackwardArgs& args);

inline constexpr Kernel<TokenShiftForwardArgs> token_shift_forward{
    "token_shift_forward", token_shift_forward_cpu, HEADWATER_CUDA(token_shift_forward_cuda)};
inline constexpr Kernel<TokenShiftBackwardArgs> token_shift_backward{
    "token_shift_backward", token_shift_backward_cpu, HEADWATER_CUDA(token_shift_backward_cuda)};

}  // namespace headwater
