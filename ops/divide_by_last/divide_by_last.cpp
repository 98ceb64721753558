#include "ops/divide_by_last/divide_by_last.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/divide_by_last/divide_by_last_kernels.h"

namespace headwater {

// With r = 1 / (x[d] + epsilon) and g the gradient of y:
//   grad_x[j] = g[j] r   for j < d,      grad_x[d] = -r sum over j of g[j] y[j]
Variable divide_by_last(const Variable& x, double epsilon) {
  require(x.shape().n_axes() >= 1 && x.dim(-1) >= 2,
          "divide_by_last: x has shape {}; it must be (..., d + 1), d at least 1", x.shape());
  Variable y(Tensor::empty(with_last(x.shape(), x.dim(-1) - 1), x.dtype(), x.device()));
  divide_by_last_forward(x.device(), {x.value(), y.value(), epsilon});

  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x, epsilon](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(x.value());
      divide_by_last_backward(x.device(), {x.value(), grad_outputs[0], grad_x, epsilon});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

}  // namespace headwater
