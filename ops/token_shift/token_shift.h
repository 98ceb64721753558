// Each step mixed with the one before it.
#pragma once

#include <vector>

#include "autograd/variable.h"

namespace headwater {

struct TokenShiftOutput {
  std::vector<Variable> y;  ///< one for each mix, (batch, length, channels)
  Variable final_state;     ///< (batch, channels): the last step's x
};

/// Several mixes of x and of x one step earlier, channel by channel, in one pass:
///
///   y_i[t] = mixes[i] x[t] + (1 - mixes[i]) x[t-1]
///
/// x[-1] is `initial_state`, or 0 without one. Where resets[b,t] is 1 a document starts at t: x[t-1] is 0 there.
///
/// Source   Peng et al. 2023, arXiv:2305.13048, equations 11 to 13.
/// Shapes   x: (batch, length, channels)   mixes: 1 to token_shift_max_mixes, each (channels)
///          initial_state: (batch, channels), may be absent   resets: i32 (batch, length), may be absent
/// Dtypes   f32, f64; bf16 on a GPU, where the mixes are f32; states are of x's dtype.
/// Grads    to x, every mix and initial_state, from all outputs. Saves nothing besides its inputs.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape, dtype, device, or a reset that is not 0 or 1; the text names the argument.
TokenShiftOutput token_shift(const Variable& x, const std::vector<Variable>& mixes,
                             const Variable& initial_state = {}, const Tensor& resets = {});

inline constexpr int token_shift_max_mixes = 4;

}  // namespace headwater
