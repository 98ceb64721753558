#include "ops/causal_conv1d/causal_conv1d.h"

#include "autograd/tape.h"
#include "ops/causal_conv1d/causal_conv1d_kernels.h"
#include "ops/check.h"

namespace headwater {
namespace {

constexpr const char* op = "causal_conv1d";

void check_arguments(const Variable& x, const Variable& weight, const Variable& bias,
                     const Variable& initial_state, const Tensor& resets,
                     const CausalConv1dOptions& options) {
  require(x.shape().n_axes() == 3, "{}: x has shape {}; it must be (batch, length, channels)", op, x.shape());
  require(x.dim(1) >= 1, "{}: length is 0; a sequence has at least one step", op);
  const int64_t channels = x.dim(2);
  require(weight.shape().n_axes() == 2 && weight.dim(0) == channels && weight.dim(1) >= 1,
          "{}: weight has shape {}; it must be (channels, d_conv) with channels = {}", op, weight.shape(),
          channels);
  check_parameter(op, "weight", weight, x);
  if (bias.defined()) {
    check_shape(op, "bias", bias, {channels}, "(channels)");
    check_parameter(op, "bias", bias, x);
  }
  if (initial_state.defined()) {
    const Shape& shape = initial_state.shape();
    require(
        shape.n_axes() == 3 && shape[0] == x.dim(0) && shape[1] >= weight.dim(1) - 1 && shape[2] == channels,
        "{}: initial_state has shape {}; it must be (batch, at least d_conv - 1, channels) = ({}, >= {}, {})",
        op, shape, x.dim(0), weight.dim(1) - 1, channels);
    check_like(op, "initial_state", initial_state, x);
  }
  check_resets(op, resets, x.dim(0), x.dim(1));
  require(!resets.defined() || resets.device() == x.device(),
          "{}: resets are on {}; they must be on {} like the other arguments", op, to_string(resets.device()),
          to_string(x.device()));
  require(options.state_length >= 0, "{}: state_length is {}; it must not be negative", op,
          options.state_length);
}

}  // namespace

// With p the value before the activation and g = grad_y act'(p):
//   grad_x[s]      = sum_w weight[w] g[s + (d_conv-1) - w]   over steps in s's document, +
//   grad_final_state[s] grad_weight[w] = sum_t g[t] x[t - (d_conv-1) + w],   grad_bias = sum_t g[t]
// p is recomputed: that costs d_conv multiplications, storing it would cost a tensor of x's size.
CausalConv1dOutput causal_conv1d(const Variable& x, const Variable& weight, const Variable& bias,
                                 const Variable& initial_state, const Tensor& resets,
                                 const CausalConv1dOptions& options) {
  check_arguments(x, weight, bias, initial_state, resets, options);
  const int64_t state_length = options.state_length > 0 ? options.state_length : weight.dim(1) - 1;
  Variable y(empty_like(x.value()));
  Variable final_state(Tensor::empty({x.dim(0), state_length, x.dim(2)}, x.dtype(), x.device()));
  causal_conv1d_forward(x.device(), {x.value(), weight.value(), bias.value(), initial_state.value(), resets,
                                     y.value(), final_state.value(), options.silu});

  if (Tape* tape = Tape::recording({x, weight, bias, initial_state})) {
    const bool silu = options.silu;
    tape->record({&y, &final_state}, [=](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_y = grad_outputs[0].defined() ? grad_outputs[0] : zeros_like(x.value());
      const Tensor grad_x = empty_like(x.value());
      const Tensor grad_initial = initial_state.defined() ? empty_like(initial_state.value()) : Tensor();
      const Gradient::Target grad_weight = gradient_target(weight);
      const Gradient::Target grad_bias = gradient_target(bias);
      causal_conv1d_backward(x.device(),
                             {x.value(), weight.value(), bias.value(), initial_state.value(), resets, grad_y,
                              grad_outputs[1], grad_x, grad_initial, grad_weight.tensor, grad_bias.tensor,
                              grad_weight.accumulate, grad_bias.accumulate, silu});
      x.add_gradient(grad_x);
      initial_state.add_gradient(grad_initial);
    });
  }
  return {y, final_state};
}

}  // namespace headwater
