#include "ops/rearrange/rearrange.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/rearrange/rearrange_kernels.h"

namespace headwater {
namespace {

Shape with_last_two_swapped(const Shape& shape) {
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  std::swap(sizes[sizes.size() - 1], sizes[sizes.size() - 2]);
  return Shape(sizes);
}

Tensor transposed(const Tensor& x) {
  const Tensor y = Tensor::empty(with_last_two_swapped(x.shape()), x.dtype(), x.device());
  transpose_last_kernel(x.device(), {x, y});
  return y;
}

}  // namespace

// The gradient of each moves the elements back; repeat_leading's sums them.

Variable reshape(const Variable& x, const Shape& shape) {
  Variable y(x.value().reshape(shape));
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x = x.without_value(), shape = x.shape()](const std::vector<Tensor>& grad_outputs) {
      x.add_gradient(grad_outputs[0].reshape(shape));
    });
  }
  return y;
}

Variable concat_last(const Variable& a, const Variable& b) {
  check_shape("concat_last", "b", b, with_last(a.shape(), b.dim(-1)), "the shape of a but for the last axis");
  check_like("concat_last", "b", b, a);
  const int64_t rows = rows_of(a.shape()), d_a = a.dim(-1), d_b = b.dim(-1), width = d_a + d_b;
  Variable y(Tensor::empty(with_last(a.shape(), width), a.dtype(), a.device()));
  copy_columns(a.device(), {a.value(), y.value(), rows, d_a, d_a, 0, width, 0});
  copy_columns(a.device(), {b.value(), y.value(), rows, d_b, d_b, 0, width, d_a});
  if (Tape* tape = Tape::recording({a, b})) {
    tape->record({&y}, [=](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_a = empty_like(a.value()), grad_b = empty_like(b.value());
      copy_columns(a.device(), {grad_outputs[0], grad_a, rows, d_a, width, 0, d_a, 0});
      copy_columns(a.device(), {grad_outputs[0], grad_b, rows, d_b, width, d_a, d_b, 0});
      a.add_gradient(grad_a);
      b.add_gradient(grad_b);
    });
  }
  return y;
}

Variable narrow_last(const Variable& x, int64_t begin, int64_t end) {
  const int64_t rows = rows_of(x.shape()), d = x.dim(-1), width = end - begin;
  require(0 <= begin && begin <= end && end <= d, "narrow_last: [{}, {}) is not a range of {} columns", begin,
          end, d);
  Variable y(Tensor::empty(with_last(x.shape(), width), x.dtype(), x.device()));
  copy_columns(x.device(), {x.value(), y.value(), rows, width, d, begin, width, 0});
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [=](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = zeros_like(x.value());
      copy_columns(x.device(), {grad_outputs[0], grad_x, rows, width, width, 0, d, begin});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

Variable transpose_last(const Variable& x) {
  require(x.shape().n_axes() >= 2, "transpose_last: x has shape {}; it must be (..., m, n)", x.shape());
  Variable y(transposed(x.value()));
  if (Tape* tape = Tape::recording({x})) {
    tape->record(
        {&y}, [x](const std::vector<Tensor>& grad_outputs) { x.add_gradient(transposed(grad_outputs[0])); });
  }
  return y;
}

Variable repeat_leading(const Variable& x, int64_t count) {
  require(count >= 1, "repeat_leading: count is {}; it must be at least 1", count);
  std::vector<int64_t> sizes(x.shape().begin(), x.shape().end());
  sizes.insert(sizes.begin(), count);
  Variable y(Tensor::empty(Shape(sizes), x.dtype(), x.device()));
  repeat_leading_kernel(x.device(), {x.value(), y.value()});
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(x.value());
      sum_leading(x.device(), {grad_outputs[0], grad_x});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

}  // namespace headwater
