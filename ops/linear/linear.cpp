#include "ops/linear/linear.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/linear/linear_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& x, const Variable& weight, const Variable& bias) {
  require(weight.shape().n_axes() == 2, "linear: weight has shape {}; it must be (d_out, d_in)",
          weight.shape());
  require(x.shape().n_axes() >= 1 && x.dim(-1) == weight.dim(1),
          "linear: x has shape {}; its last axis must be d_in = {}, from weight {}", x.shape(), weight.dim(1),
          weight.shape());
  check_like("linear", "weight", weight, x);
  if (bias.defined()) {
    check_shape("linear", "bias", bias, {weight.dim(0)}, "(d_out)");
    check_parameter("linear", "bias", bias, x);
  }
}

}  // namespace

// grad_x = grad_y W,   grad_W = grad_y^T x,   grad_b = sum over rows of grad_y.
Variable linear(const Variable& x, const Variable& weight, const Variable& bias) {
  check_arguments(x, weight, bias);
  Variable y(Tensor::empty(with_last(x.shape(), weight.dim(0)), x.dtype(), x.device()));
  linear_forward(x.device(), {x.value(), weight.value(), bias.value(), y.value()});

  if (Tape* tape = Tape::recording({x, weight, bias})) {
    tape->record({&y}, [x, weight, bias](const std::vector<Tensor>& grad_outputs) {
      const Gradient::Target grad_x = gradient_target(x);
      const Gradient::Target grad_weight = weight_gradient_target(weight);
      const Gradient::Target grad_bias = gradient_target(bias);
      linear_backward(x.device(),
                      {x.value(), weight.value(), grad_outputs[0], grad_x.tensor, grad_weight.tensor,
                       grad_bias.tensor, grad_x.accumulate, grad_weight.accumulate, grad_bias.accumulate});
    });
  }
  return y;
}

}  // namespace headwater
