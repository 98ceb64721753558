// Random zeroing of activations during training.
#pragma once

#include <cstdint>

#include "autograd/variable.h"

namespace headwater {

/// Which random numbers a dropout draws: a place in Philox's output (core/random.h). Each call of a training
/// run needs a place of its own, e.g. the run's seed, the layer's stream and an offset that grows with the
/// step.
struct DropoutKey {
  uint64_t seed = 0;
  uint64_t stream = 0;
  uint64_t offset = 0;  ///< a call draws the blocks from offset to offset + (numel + 3) / 4
};

/// Dropout: each element is zeroed with probability drop_prob, the others grow so that the mean stays.
///
///   y[i] = 0                        if word i % 4 of block offset + i / 4 is below floor(drop_prob 2^32)
///   y[i] = x[i] / (1 - drop_prob)   otherwise;   i counts the elements of x in memory order
///
/// Source   Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting" (here
///          the scaling is in training, not in inference).
/// Shapes   any.
/// Values   0 <= drop_prob < 1. With 0, x itself is returned.
/// Dtypes   f32, f64; on a GPU f32, bf16. All drop the same elements, on all devices.
/// Grads    to x. Saves nothing: the backward draws the same numbers again.
/// Repeat   the mask is a function of the key and the position alone: same bits, whatever the number of
///          threads.
/// Throws   an input error for a drop_prob out of range or a wrong dtype.
Variable dropout(const Variable& x, double drop_prob, const DropoutKey& key);

}  // namespace headwater
