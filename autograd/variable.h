// A tensor and the place where its gradient gathers.
#pragma once

#include <memory>
#include <utility>

#include "core/tensor.h"

namespace headwater {

/// The gradient of one variable, gathered during Tape::backward. A parameter's is pinned: it lives in a flat
/// buffer, outlasts the tape, and contributions are added to what is there. Any other starts absent.
class Gradient {
 public:
  Gradient() = default;
  explicit Gradient(Tensor pinned) : tensor_(std::move(pinned)), is_pinned_(true) {}

  /// The sum so far; undefined if nothing has arrived.
  const Tensor& tensor() const { return tensor_; }

  /// Adds `contribution`, which the caller must not write to afterwards.
  void add(const Tensor& contribution);

  /// Memory for a kernel that can add by itself (beta of a GEMM): the sum so far with accumulate = true, or
  /// fresh uninitialised memory of value's shape, of `dtype`, with accumulate = false, which the kernel must then
  /// fill entirely.
  struct Target {
    Tensor tensor;
    bool accumulate;
  };
  Target target(const Tensor& value, DType dtype);

  /// Drops the sum of an unpinned gradient.
  void release();

 private:
  Tensor tensor_;
  bool is_pinned_ = false;
};

/// What operators take and return. Copies share the tensor and the gradient. A variable without a Gradient is
/// a constant: nothing is recorded for it. An undefined variable stands for an absent optional argument.
class Variable {
 public:
  Variable() = default;
  /// A constant.
  explicit Variable(Tensor value) : value_(std::move(value)) {}
  /// A leaf: gradients gather in fresh memory.
  static Variable leaf(Tensor value);
  /// A parameter: `gradient` has the value's shape, and every backward adds to it. Its dtype is the value's, or f32 for
  /// a bf16 value.
  static Variable parameter(Tensor value, Tensor gradient);

  bool defined() const { return value_.defined(); }
  const Tensor& value() const { return value_; }
  const Shape& shape() const { return value_.shape(); }
  int64_t dim(int axis) const { return value_.dim(axis); }
  DType dtype() const { return value_.dtype(); }
  Device device() const { return value_.device(); }
  bool requires_gradient() const { return gradient_ != nullptr; }
  /// Only where requires_gradient().
  Gradient& gradient() const { return *gradient_; }

  /// The gradient's place without the value: what a backward function should capture of an input whose elements it does
  /// not need, so that the tape does not keep them alive.
  Variable without_value() const;
  /// The same elements as a constant: gradients stop here.
  Variable detach() const { return Variable(value_); }
  /// Rows [begin, end) of a parameter's leading axis, itself a parameter: value and gradient are views.
  Variable parameter_rows(int64_t begin, int64_t end) const;
  /// The same parameter under another shape; value and gradient are views.
  Variable parameter_reshape(const Shape& shape) const;

  /// Adds to the gradient where there is one; does nothing for a constant.
  void add_gradient(const Tensor& contribution) const {
    if (gradient_) gradient_->add(contribution);
  }

 private:
  friend class Tape;

  Tensor value_;
  std::shared_ptr<Gradient> gradient_;
};

}  // namespace headwater
