// Rotary position embedding.
#pragma once

#include "autograd/variable.h"

namespace headwater {

struct RotaryOptions {
  int64_t dim = 0;           ///< the first this many channels of a head are rotated; even
  double base = 10000.0;     ///< of the frequencies
  bool interleaved = false;  ///< channel 2c is paired with 2c + 1; false: c with c + dim / 2
};

/// Rotates pairs of channels of each head by angles that grow with the position, so that the inner product of a query and
/// a key depends on the distance of their positions.
///
///   (y_a, y_b) = (x_a cos - x_b sin, x_a sin + x_b cos) of the angle positions[b,t] base^(-2c / dim),   c < dim / 2
///
/// with (a, b) the channels of pair c. Channels from dim on are copied.
///
/// Source   Su et al. 2021, arXiv:2104.09864; halves as in GPT-NeoX, interleaved as in the paper and GPT-J.
/// Shapes   x, y: (batch, length, n_heads, head_dim)   positions: i32 (batch, length)
/// Dtypes   f32, f64; bf16 on a GPU. Angles are computed in f64 and reduced to one turn before they are rounded.
/// Grads    to x: the rotation by the opposite angle. Saves the positions alone.
/// Repeat   same inputs, same bits.
/// Throws   an input error for a wrong shape, dtype or device; the text names the argument.
Variable rotary(const Variable& x, const Tensor& positions, const RotaryOptions& options);

}  // namespace headwater
