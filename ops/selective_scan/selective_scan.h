// The selective state space of Mamba: a diagonal recurrence whose coefficients change at every step.
#pragma once

#include "autograd/variable.h"

namespace headwater {

struct SelectiveScanInputs {
  Variable x, dt;  ///< (batch, length, d_inner)
  Variable A;      ///< (d_inner, d_state), negative
  Variable B, C;   ///< (batch, length, n_groups, d_state)
  // May be absent:
  Variable D = {};              ///< (d_inner)
  Variable z = {};              ///< (batch, length, d_inner), the gate
  Variable dt_bias = {};        ///< (d_inner)
  Variable initial_state = {};  ///< (batch, d_inner, d_state)
  Tensor resets = {};           ///< i32 (batch, length): 1 where a document starts
};

struct SelectiveScanOptions {
  bool softplus = true;  ///< dt is given before softplus
};

struct SelectiveScanOutput {
  Variable y;            ///< (batch, length, d_inner)
  Variable final_state;  ///< (batch, d_inner, d_state)
};

/// Selective state-space scan (S6). For each channel d, whose group of B and C is g = d / (d_inner / n_groups):
///
///   dt'[t,d]  = softplus(dt[t,d] + dt_bias[d])
///   h[t,d,n]  = exp(dt'[t,d] A[d,n]) h[t-1,d,n] + dt'[t,d] B[t,g,n] x[t,d],    h[-1] = initial_state, or 0
///   y[t,d]    = (sum_n C[t,g,n] h[t,d,n] + D[d] x[t,d]) silu(z[t,d])
///
/// Where resets[b,t] is 1 a document starts at t: h[t-1] counts as 0 there. final_state is h of the last step.
///
/// Source   Gu & Dao 2023, arXiv:2312.00752, algorithm 2; the input term dt B (Euler), as in the authors' code.
/// Values   dt' >= 0 and A < 0, else the state can grow without bound. softplus does not overflow.
/// Dtypes   f32, f64; bf16 on a GPU for x, dt, B, C, z and y. A, D, dt_bias, the step sizes dt' and all states are f32
///          there.
/// Grads    to every tensor argument, from both outputs. Saves the state at the borders of stretches of steps (64 on a
///          CPU, 8 on a GPU) and computes those inside again: memory d_state / 64 or d_state / 8 that of x.
/// Repeat   same inputs, same bits, whatever the number of threads; no atomics on a GPU.
/// Throws   an input error for a wrong shape, dtype, or a reset that is not 0 or 1; the text names the argument.
SelectiveScanOutput selective_scan(const SelectiveScanInputs& inputs,
                                   const SelectiveScanOptions& options = {});

}  // namespace headwater
