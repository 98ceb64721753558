#include "ops/step_size/step_size.h"

#include <limits>

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/step_size/step_size_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& x, const Variable& A, const Variable& dt_bias,
                     const StepSizeOptions& options) {
  require(x.shape().n_axes() == 3, "step_size: x has shape {}; it must be (batch, length, n_heads)",
          x.shape());
  check_shape("step_size", "A", A, {x.dim(2)}, "(n_heads)");
  check_parameter("step_size", "A", A, x);
  if (dt_bias.defined()) {
    check_shape("step_size", "dt_bias", dt_bias, {x.dim(2)}, "(n_heads)");
    check_parameter("step_size", "dt_bias", dt_bias, x);
  }
  const auto& [lower, upper] = options.limits;
  require(!lower || !upper || *lower <= *upper,
          "step_size: limits are [{}, {}]; the first must not exceed the second", lower.value_or(0),
          upper.value_or(0));
}

}  // namespace

// With p = x + dt_bias and g = grad_dt + A grad_log_decay:
//   grad_x = g [lower <= softplus(p) <= upper] sigmoid(p)
//   grad_dt_bias = sum of grad_x,   grad_A = sum of dt grad_log_decay, both over batch and length.
StepSizeOutput step_size(const Variable& x, const Variable& A, const Variable& dt_bias,
                         const StepSizeOptions& options) {
  check_arguments(x, A, dt_bias, options);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto output = [&] {
    return Variable(Tensor::empty(x.shape(), compute_dtype(x.dtype()), x.device()));
  };
  Variable dt = output(), log_decay = output();
  StepSizeForwardArgs args{x.value(),
                           A.value(),
                           dt_bias.value(),
                           dt.value(),
                           log_decay.value(),
                           options.softplus,
                           options.limits[0].value_or(-infinity),
                           options.limits[1].value_or(infinity)};
  step_size_forward(x.device(), args);

  if (Tape* tape = Tape::recording({x, A, dt_bias})) {
    args.dt = args.log_decay = Tensor();
    tape->record({&dt, &log_decay}, [x, A, dt_bias, args](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(x.value());
      const Tensor grad_A = empty_like(A.value());
      const Tensor grad_dt_bias = dt_bias.defined() ? empty_like(dt_bias.value()) : Tensor();
      step_size_backward(x.device(), {args, grad_outputs[0], grad_outputs[1], grad_x, grad_A, grad_dt_bias});
      x.add_gradient(grad_x);
      A.add_gradient(grad_A);
      dt_bias.add_gradient(grad_dt_bias);
    });
  }
  return {dt, log_decay};
}

}  // namespace headwater
