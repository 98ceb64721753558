// The selective state space of Mamba-2, from its small operators and the matrix-state engine.
#pragma once

#include "ops/chunked_matrix_state/chunked_matrix_state.h"
#include "ops/step_size/step_size.h"

namespace headwater {

struct SsdInputs {
  Variable x, dt;          ///< (batch, length, n_heads, head_dim), (batch, length, n_heads)
  Variable A;              ///< (n_heads), negative
  Variable B, C;           ///< (batch, length, n_groups, d_state)
  Variable D;              ///< (n_heads) or (n_heads, head_dim), may be absent
  Variable dt_bias;        ///< (n_heads), may be absent
  Variable initial_state;  ///< (batch, n_heads, d_state, head_dim), may be absent
  Tensor resets;           ///< i32 (batch, length), may be absent
};

/// State space duality (SSD): one scalar decay per head and step, a matrix as state.
///
///   dt'  = step_size(dt, dt_bias)                    softplus and limits as `step` says
///   h[t] = exp(dt'[t] A) h[t-1] + B[t] (dt'[t] x[t])^T,    h[-1] = initial_state
///   y[t] = h[t]^T C[t] + D x[t]
///
/// Source   Dao & Gu 2024, arXiv:2405.21060. Their state is (head_dim, d_state); ours is its transpose.
/// Returns  y: (batch, length, n_heads, head_dim), final_state: (batch, n_heads, d_state, head_dim).
/// Dtypes, Grads, Repeat, Throws   as step_size and chunked_matrix_state, of which it is made.
MatrixStateOutput ssd(const SsdInputs& inputs, const StepSizeOptions& step, const MatrixStateOptions& engine);

}  // namespace headwater
