#include "ops/rms_norm/rms_norm.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/rms_norm/rms_norm_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& x, const Variable& weight, const Variable& gate,
                     const RmsNormOptions& options) {
  require(x.shape().n_axes() >= 1, "rms_norm: x is a scalar; it must be (..., d)");
  const int64_t d = x.dim(-1);
  check_shape("rms_norm", "weight", weight, {d}, "(d)");
  check_parameter("rms_norm", "weight", weight, x);
  require(options.n_groups >= 1 && d % options.n_groups == 0,
          "rms_norm: {} channels cannot be split into {} groups of equal size", d, options.n_groups);
  if (gate.defined()) {
    check_shape("rms_norm", "gate", gate, x.shape(), "the shape of x");
    check_dtype("rms_norm", "gate", gate, options.output_dtype.value_or(x.dtype()));
    check_device("rms_norm", "gate", gate, x);
  }
}

}  // namespace

// Per group of n channels, with r = 1 / sqrt(mean(v^2) + epsilon) and g the gradient of v r weight:
//   grad_v      = r (g weight - v r^2 mean(g weight v))
//   grad_weight = sum over rows of g v r
// v = x silu(gate):  grad_x = grad_v silu(gate),  grad_gate = grad_v x silu'(gate)
// norm before gate:  g = grad_y silu(gate),  grad_x = grad_v,  grad_gate = grad_y v r weight silu'(gate)
Variable rms_norm(const Variable& x, const Variable& weight, const Variable& gate,
                  const RmsNormOptions& options) {
  check_arguments(x, weight, gate, options);
  const Tensor inverse_rms =
      Tensor::empty({rows_of(x.shape()), options.n_groups}, compute_dtype(x.dtype()), x.device());
  Variable y(Tensor::empty(x.shape(), options.output_dtype.value_or(x.dtype()), x.device()));
  rms_norm_forward(x.device(), {x.value(), weight.value(), gate.value(), y.value(), inverse_rms,
                                options.epsilon, options.norm_before_gate});

  if (Tape* tape = Tape::recording({x, weight, gate})) {
    tape->record({&y}, [x, weight, gate, inverse_rms, options](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(x.value());
      const Tensor grad_gate = gate.defined() ? empty_like(gate.value()) : Tensor();
      const Gradient::Target grad_weight = gradient_target(weight);
      rms_norm_backward(x.device(),
                        {x.value(), weight.value(), gate.value(), inverse_rms, grad_outputs[0], grad_x,
                         grad_gate, grad_weight.tensor, grad_weight.accumulate, options.norm_before_gate});
      x.add_gradient(grad_x);
      gate.add_gradient(grad_gate);
    });
  }
  return y;
}

}  // namespace headwater
