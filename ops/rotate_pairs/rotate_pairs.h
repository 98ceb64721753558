// Rotation of neighbouring pairs of channels by angles that depend on the position.
#pragma once

#include "autograd/variable.h"

namespace headwater {

struct RotatePairsOptions {
  Tensor row_scale = {};  ///< (batch, length, n_heads): a factor for each row, a constant; absent: 1
  double factor = 1.0;    ///< for all rows
};

/// Rotary positions from a table of angles (ops/rotary computes its own): the product of a rotated query and a rotated key depends on the difference of their positions.
///
///   y[2j]     = s (x[2j] cos[j] - x[2j+1] sin[j])
///   y[2j + 1] = s (x[2j+1] cos[j] + x[2j] sin[j])        s = factor * row_scale[b, t, h]
///
/// with (cos[j], sin[j]) = rotation[b, t, j], the same for all heads.
///
/// Source   Su et al. 2021, arXiv:2104.09864; in retention Sun et al. 2023, arXiv:2307.08621.
/// Shapes   x, y: (batch, length, n_heads, d), d even   rotation: (batch, length, d / 2, 2).
/// Dtypes   f32, f64; f32 and bf16 on a GPU. With bf16, rotation and row_scale are f32.
/// Grads    to x alone: g turned back by the same angles, times s. Saves nothing of the size of x.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
Variable rotate_pairs(const Variable& x, const Tensor& rotation, const RotatePairsOptions& options = {});

}  // namespace headwater
