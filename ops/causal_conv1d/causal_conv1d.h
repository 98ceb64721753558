// Causal depthwise convolution over time, with a window that can be handed on.
#pragma once

#include "autograd/variable.h"

namespace headwater {

struct CausalConv1dOptions {
  bool silu = true;          ///< apply SiLU to the result
  int64_t state_length = 0;  ///< rows of the returned window; 0 means d_conv - 1, what continuing needs
};

struct CausalConv1dOutput {
  Variable y;
  Variable final_state;
};

/// Each channel is filtered by its own d_conv taps; the last tap meets the present step.
///
///   y[b,t,c] = act(bias[c] + sum_{w=0..d_conv-1} weight[c,w] * x[b, t-(d_conv-1)+w, c]),   act = SiLU or
///   identity
///
/// Steps before the sequence are read from `initial_state` (its last row is step -1), or are 0 without one.
/// Where resets[b,t] is 1 a document starts at t: no tap reaches back across that border. final_state holds
/// the last state_length inputs, oldest first; those before the last document's start are 0.
///
/// Source   Dao, causal-conv1d; the convolution of Mamba, arXiv:2312.00752.
/// Shapes   x: (batch, length, channels)   weight: (channels, d_conv)   bias: (channels), may be absent
///          initial_state: (batch, >= d_conv - 1, channels), may be absent   resets: i32 (batch, length), may
///          be absent y: (batch, length, channels)   final_state: (batch, state_length, channels)
/// Dtypes   f32, f64; bf16 on a GPU, where weight, bias and their gradients are f32; the states are of x's dtype.
/// Grads    to x, weight, bias and initial_state, from both outputs. Saves nothing besides its inputs.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape, dtype, or a reset that is not 0 or 1; the text names the
///          argument.
CausalConv1dOutput causal_conv1d(const Variable& x, const Variable& weight, const Variable& bias = {},
                                 const Variable& initial_state = {}, const Tensor& resets = {},
                                 const CausalConv1dOptions& options = {});

}  // namespace headwater
