// Layer normalisation.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// LayerNorm over the last axis.
///
///   y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * weight + bias
///
/// Source   Ba, Kiros & Hinton 2016, arXiv:1607.06450.
/// Shapes   x: (..., d)   weight, bias: (d)   y: (..., d).
/// Values   epsilon >= 0; with 0 and a constant row y is NaN.
/// Dtypes   f32, f64; bf16 on a GPU, with weight, bias, the sums and what is saved in f32. Two passes over a row: the
///          mean, then the variance of what is left, as the difference of two means of squares would cancel when the
///          mean is large.
/// Grads    to x, weight and bias. Saves two numbers per row besides its inputs.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
Variable layer_norm(const Variable& x, const Variable& weight, const Variable& bias, double epsilon = 1e-5);

}  // namespace headwater
