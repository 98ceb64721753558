// The matrix-state recurrence behind linear attention, retention and Mamba-2.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// Which of the equal forms computes the recurrence.
enum class MatrixStateForm {
  automatic,  ///< recurrent for a few steps without gradient (decoding), else chunked
  chunked,   ///< matrix products within chunks, the state handed over between them; one chunk is the parallel
             ///< form
  recurrent  ///< the definition, step by step
};

struct MatrixStateOptions {
  int64_t chunk_len = 32;  ///< steps per chunk; a matter of speed only. A GPU takes 64 for 32 and more
  MatrixStateForm form = MatrixStateForm::automatic;
};

struct MatrixStateInputs {
  Variable q, k, v;
  Variable log_decay;  ///< absent: no decay; (n_heads): constant; (batch, length, n_heads): per step
  Variable
      value_scale;  ///< absent, or (batch, length, n_heads): v is multiplied by it before it enters the state
  Variable skip;    ///< absent, or (n_heads) or (n_heads, d_value): skip * v (unscaled) is added to y
  Variable initial_state;  ///< absent: zeros
  Tensor resets;           ///< absent, or i32 (batch, length): 1 where a document starts
};

struct MatrixStateOutput {
  Variable y;
  Variable final_state;
};

/// A linear recurrence over one matrix per head, read out by a vector at every step.
///
///   S[t] = exp(log_decay[t]) * S[t-1] + k[t] (value_scale[t] v[t])^T,    S[-1] = initial_state
///   y[t] = S[t]^T q[t] + skip * v[t]
///
/// Head h reads q and k of group h / (n_heads / n_groups). Where resets[b,t] is 1, S[t-1] counts as zero.
///
/// Source   Dao & Gu 2024, arXiv:2405.21060 (SSD: q = C, k = B, value_scale = dt, log_decay = dt * A);
///          without decay Katharopoulos et al. 2020, arXiv:2006.16236; with a constant one Sun et al. 2023,
///          arXiv:2307.08621.
/// Shapes   q, k: (batch, length, n_groups, d_key)   v, y: (batch, length, n_heads, d_value) initial_state,
///          final_state: (batch, n_heads, d_key, d_value). Any sizes; n_groups divides n_heads.
/// Values   log_decay <= 0. Only differences of its running sums are exponentiated, so no decay is too strong
///          or too weak; the sums are held in double precision.
/// Dtypes   f32, f64; bf16 and f32 on a GPU. With bf16 q, k, v and y, everything else is f32.
/// Grads    to every variable, from both outputs. Saves only its inputs: the states at chunk borders are
///          recomputed in the backward, on the CPU one head at a time, on a GPU all at once.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
MatrixStateOutput chunked_matrix_state(const MatrixStateInputs& inputs,
                                       const MatrixStateOptions& options = {});

}  // namespace headwater
