// The small operators that move elements and compute nothing.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// Moving elements:
///
///   reshape(x, shape)          the same elements under another shape; shares memory
///   concat_last(a, b)          y[..., j] = a[..., j] for j < d_a, else b[..., j - d_a]
///   narrow_last(x, begin, end) y[..., j] = x[..., begin + j] for j < end - begin
///   transpose_last(x)          y[..., i, j] = x[..., j, i]
///   repeat_leading(x, count)   y[i, ...] = x[...] for i < count: a parameter shared by a batch
///
/// Shapes   concat_last: (..., d_a), (..., d_b) -> (..., d_a + d_b)   narrow_last: (..., d) -> (..., end - begin)
///          transpose_last: (..., m, n) -> (..., n,
///          m) repeat_leading: (...) -> (count, ...).
/// Dtypes   f32, f64; on a GPU f32, bf16. The gradient of repeat_leading is summed in f32 there.
/// Grads    to every variable.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
Variable reshape(const Variable& x, const Shape& shape);
Variable concat_last(const Variable& a, const Variable& b);
Variable narrow_last(const Variable& x, int64_t begin, int64_t end);
Variable transpose_last(const Variable& x);
Variable repeat_leading(const Variable& x, int64_t count);

}  // namespace headwater
