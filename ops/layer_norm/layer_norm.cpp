#include "ops/layer_norm/layer_norm.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/layer_norm/layer_norm_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& x, const Variable& weight, const Variable& bias, double epsilon) {
  require(x.shape().n_axes() >= 1, "layer_norm: x is a scalar; it must be (..., d)");
  const int64_t d = x.dim(-1);
  check_shape("layer_norm", "weight", weight, {d}, "(d)");
  check_parameter("layer_norm", "weight", weight, x);
  check_shape("layer_norm", "bias", bias, {d}, "(d)");
  check_parameter("layer_norm", "bias", bias, x);
  require(epsilon >= 0.0, "layer_norm: epsilon is {}; it must be >= 0", epsilon);
}

}  // namespace

// Per row of d channels, with r = 1 / sqrt(variance + epsilon), n = (x - mean(x)) r and g = grad_y weight:
//   grad_x      = r (g - mean(g) - n mean(g n))
//   grad_weight = sum over rows of grad_y n
//   grad_bias   = sum over rows of grad_y
Variable layer_norm(const Variable& x, const Variable& weight, const Variable& bias, double epsilon) {
  check_arguments(x, weight, bias, epsilon);
  const Tensor mean = Tensor::empty({rows_of(x.shape())}, compute_dtype(x.dtype()), x.device());
  const Tensor inverse_std = empty_like(mean);
  Variable y(empty_like(x.value()));
  layer_norm_forward(x.device(),
                     {x.value(), weight.value(), bias.value(), y.value(), mean, inverse_std, epsilon});

  if (Tape* tape = Tape::recording({x, weight, bias})) {
    tape->record({&y}, [x, weight, bias, mean, inverse_std](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(x.value());
      const Gradient::Target grad_weight = gradient_target(weight);
      const Gradient::Target grad_bias = gradient_target(bias);
      layer_norm_backward(
          x.device(), {x.value(), weight.value(), mean, inverse_std, grad_outputs[0], grad_x,
                       grad_weight.tensor, grad_bias.tensor, grad_weight.accumulate, grad_bias.accumulate});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

}  // namespace headwater
