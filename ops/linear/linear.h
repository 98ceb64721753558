// Linear layers: matrix products with weights stored as (out, in).
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// y = x W^T + b.
///
/// Shapes   x: (..., d_in)   weight: (d_out, d_in)   bias: (d_out), may be absent   y: (..., d_out).
/// Dtypes   f32, f64; bf16 on a GPU, where bias and the gradients of weight and bias are f32.
/// Grads    to x, weight and bias; they are added into place by the matrix product itself, so that several
///          layers on one x, or rows of one weight used apart (Variable::parameter_rows), cost no extra sums.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
Variable linear(const Variable& x, const Variable& weight, const Variable& bias = {});

}  // namespace headwater
