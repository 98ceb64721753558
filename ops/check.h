// Checks of operators' arguments, with texts that name the operator, the argument, what it is and what it
// must be.
#pragma once

#include "autograd/variable.h"
#include "core/error.h"

namespace headwater {

/// `argument` must have exactly this shape; `meaning` spells it in the operator's letters, e.g. "(batch,
/// length, d)".
inline void check_shape(const char* op, const char* argument, const Variable& value, const Shape& expected,
                        const char* meaning) {
  require(value.shape() == expected, "{}: {} has shape {}; it must be {} = {}", op, argument, value.shape(),
          meaning, expected);
}

inline void check_device(const char* op, const char* argument, const Variable& value,
                         const Variable& reference) {
  require(value.device() == reference.device(), "{}: {} is on {}; it must be on {} like the other arguments",
          op, argument, to_string(value.device()), to_string(reference.device()));
}

inline void check_dtype(const char* op, const char* argument, const Variable& value, DType expected) {
  require(value.dtype() == expected, "{}: {} is {}; it must be {} like the other arguments", op, argument,
          name_of(value.dtype()), name_of(expected));
}

/// `argument` must agree with `reference` in dtype and device.
inline void check_like(const char* op, const char* argument, const Variable& value,
                       const Variable& reference) {
  check_dtype(op, argument, value, reference.dtype());
  check_device(op, argument, value, reference);
}

/// `argument` is one of the numbers that must not lose bits: of compute_dtype(reference's dtype), on its device.
inline void check_parameter(const char* op, const char* argument, const Variable& value,
                            const Variable& reference) {
  const DType expected = compute_dtype(reference.dtype());
  require(value.dtype() == expected, "{}: {} is {}; beside {} arguments it must be {}", op, argument,
          name_of(value.dtype()), name_of(reference.dtype()), name_of(expected));
  check_device(op, argument, value, reference);
}

/// `resets` is absent or i32 (batch, length) with a 1 where a document starts, else 0. On a GPU the numbers are not
/// looked at; kernels there take any but 0 for a 1.
void check_resets(const char* op, const Tensor& resets, int64_t batch, int64_t length);

/// Where a kernel puts the gradient of `variable`; an undefined tensor if none is wanted.
inline Gradient::Target gradient_target(const Variable& variable) {
  return variable.requires_gradient() ? variable.gradient().target(variable.value(), variable.dtype())
                                      : Gradient::Target{};
}

/// The same for a weight, whose gradient is f32 where it is bf16.
inline Gradient::Target weight_gradient_target(const Variable& weight) {
  return weight.requires_gradient() ? weight.gradient().target(weight.value(), compute_dtype(weight.dtype()))
                                    : Gradient::Target{};
}

/// `shape` with its last axis replaced.
Shape with_last(const Shape& shape, int64_t size);

/// Product of all axes but the last: an operator on the last axis sees any shape as (rows, width).
inline int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (int axis = 0; axis + 1 < shape.n_axes(); ++axis) rows *= shape[axis];
  return rows;
}

}  // namespace headwater
