// Division by the last entry of a row: the normaliser of linear attention.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// The first d entries of a row over its last one. In linear attention the last value column is 1 everywhere, so that the
/// last entry of a row is the sum of the weights of the others.
///
///   y[..., j] = x[..., j] / (x[..., d] + epsilon)      j < d
///
/// Source   Katharopoulos et al. 2020, arXiv:2006.16236; epsilon is added, as in the authors' code, not a floor.
/// Shapes   x: (..., d + 1)   y: (..., d).
/// Values   x[..., d] + epsilon must not be 0: y is infinite or NaN there.
/// Dtypes   f32, f64; f32 and bf16 on a GPU, computed in f32.
/// Grads    to x. Saves nothing besides x.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape; the text names the argument.
Variable divide_by_last(const Variable& x, double epsilon);

}  // namespace headwater
