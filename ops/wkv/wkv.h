// The weighted average of RWKV-4: a softmax over the past whose weights decay, channel by channel.
#pragma once

#include "autograd/variable.h"

namespace headwater {

struct WkvInputs {
  Variable k;              ///< (batch, length, channels): exponents of the weights
  Variable v;              ///< (batch, length, channels): what is averaged
  Variable time_decay;     ///< (channels): w = exp(time_decay), so that a step multiplies weights by e^-w < 1
  Variable time_first;     ///< (channels): u, added to the exponent of the present step
  Variable initial_state;  ///< (batch, 2, channels), may be absent: nothing came before
  Tensor resets;           ///< i32 (batch, length), may be absent: 1 where a document starts
};

struct WkvOutput {
  Variable y;            ///< (batch, length, channels)
  Variable final_state;  ///< (batch, 2, channels): the past's average, and the logarithm of its weight
};

/// Each channel's average of the past and the present step:
///
///   y[t] = (sum_{s<t} e^(k[s] - (t-1-s) w) v[s] + e^(u + k[t]) v[t]) / (the same with 1 for v)
///
/// The step before is not decayed yet; the present one has its own bonus u, and counts with e^k[t] from the next step
/// on. No weight is formed as such: the state is the average a of the past and the logarithm l of its whole weight,
/// and both are updated by shares, which are sigmoids of differences of exponents. So nothing overflows whatever k is.
///
/// In the authors' state (aa, bb, pp), whose true sums are aa e^pp and bb e^pp: a = aa / bb and l = pp + log(bb).
/// Without a past a = 0 and l = wkv_no_weight.
///
/// Source   Peng et al. 2023, arXiv:2305.13048, equation 16; the code of RWKV-4 by its authors.
/// Shapes   as above.
/// Values   any finite k and v. y lies between the least and the largest v so far; the first step's y is v.
/// Dtypes   f32, f64; on a GPU k, v and y also in bf16, beside time_decay, time_first and states in f32. Computed in
///          the latter's dtype.
/// Grads    to every Variable, from both outputs. Saves the state at every wkv_stretch-th step besides its inputs.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape, dtype, device, or a reset that is not 0 or 1; the text names the argument.
WkvOutput wkv(const WkvInputs& inputs);

/// The logarithm of the weight of nothing: so low that e to it is 0, and finite, so that differences are numbers.
inline constexpr double wkv_no_weight = -1e38;

/// Steps between two states that the forward keeps for the backward, which computes those between again.
inline constexpr int64_t wkv_stretch = 32;

}  // namespace headwater
