#include "ops/chunked_matrix_state/chunked_matrix_state.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/chunked_matrix_state/chunked_matrix_state_kernels.h"

namespace headwater {
namespace {

constexpr const char* op = "chunked_matrix_state";

// Below this many steps, packing a chunk costs more than its matrix products save.
constexpr int64_t few_steps = 8;

void check_arguments(const MatrixStateInputs& in, const MatrixStateOptions& options) {
  require(in.q.shape().n_axes() == 4, "{}: q has shape {}; it must be (batch, length, n_groups, d_key)", op,
          in.q.shape());
  require(in.v.shape().n_axes() == 4, "{}: v has shape {}; it must be (batch, length, n_heads, d_value)", op,
          in.v.shape());
  const int64_t batch = in.q.dim(0), length = in.q.dim(1), n_groups = in.q.dim(2), d_key = in.q.dim(3);
  const int64_t n_heads = in.v.dim(2), d_value = in.v.dim(3);
  check_shape(op, "k", in.k, in.q.shape(), "(batch, length, n_groups, d_key)");
  check_shape(op, "v", in.v, {batch, length, n_heads, d_value}, "(batch, length, n_heads, d_value)");
  require(length >= 1, "{}: length is 0; a sequence has at least one step", op);
  require(n_groups >= 1 && n_heads % n_groups == 0,
          "{}: {} heads cannot share {} groups; n_heads must be a multiple of n_groups", op, n_heads,
          n_groups);
  require(options.chunk_len >= 1, "{}: chunk_len is {}; it must be at least 1", op, options.chunk_len);
  check_like(op, "k", in.k, in.q);
  check_like(op, "v", in.v, in.q);
  if (in.log_decay.defined()) {
    if (in.log_decay.shape().n_axes() == 1) {
      check_shape(op, "log_decay", in.log_decay, {n_heads}, "(n_heads) or (batch, length, n_heads)");
    } else {
      check_shape(op, "log_decay", in.log_decay, {batch, length, n_heads},
                  "(n_heads) or (batch, length, n_heads)");
    }
    check_parameter(op, "log_decay", in.log_decay, in.q);
  }
  if (in.value_scale.defined()) {
    check_shape(op, "value_scale", in.value_scale, {batch, length, n_heads}, "(batch, length, n_heads)");
    check_parameter(op, "value_scale", in.value_scale, in.q);
  }
  if (in.skip.defined()) {
    if (in.skip.shape().n_axes() == 1) {
      check_shape(op, "skip", in.skip, {n_heads}, "(n_heads) or (n_heads, d_value)");
    } else {
      check_shape(op, "skip", in.skip, {n_heads, d_value}, "(n_heads) or (n_heads, d_value)");
    }
    check_parameter(op, "skip", in.skip, in.q);
  }
  if (in.initial_state.defined()) {
    check_shape(op, "initial_state", in.initial_state, {batch, n_heads, d_key, d_value},
                "(batch, n_heads, d_key, d_value)");
    check_parameter(op, "initial_state", in.initial_state, in.q);
  }
  check_resets(op, in.resets, batch, length);
}

bool use_recurrent(const MatrixStateInputs& in, const MatrixStateOptions& options, bool with_gradient) {
  if (options.form == MatrixStateForm::automatic) return !with_gradient && in.q.dim(1) < few_steps;
  return options.form == MatrixStateForm::recurrent;
}

Tensor wanted(const Variable& input) {
  return input.requires_gradient() ? empty_like(input.value()) : Tensor();
}

}  // namespace

// With u = value_scale * v, g = grad_y, a = exp(log_decay), dS[t] the gradient of S[t]:
//   dS[t] = q[t] g[t]^T + a[t+1] dS[t+1]           (beyond the end: the gradient of final_state; 0 across a
//   reset) grad_q[t] = S[t] g[t]        grad_k[t] = dS[t] u[t]        grad_u[t] = dS[t]^T k[t]
//   grad_log_decay[t] = a[t] <dS[t], S[t-1]>
//   grad_value_scale = <v, grad_u>,   grad_v = value_scale * grad_u + skip * g,   grad_skip = sum over t of g
//   * v
// The chunked kernels evaluate the same sums as matrix products (see chunked_matrix_state_cpu.cpp).
MatrixStateOutput chunked_matrix_state(const MatrixStateInputs& inputs, const MatrixStateOptions& options) {
  check_arguments(inputs, options);
  const Device device = inputs.q.device();
  const Shape state_shape{inputs.q.dim(0), inputs.v.dim(2), inputs.q.dim(3), inputs.v.dim(3)};
  Variable y(empty_like(inputs.v.value()));
  Variable final_state(Tensor::empty(state_shape, compute_dtype(inputs.q.dtype()), device));
  const MatrixStateForwardArgs args{inputs.q.value(),
                                    inputs.k.value(),
                                    inputs.v.value(),
                                    inputs.log_decay.value(),
                                    inputs.value_scale.value(),
                                    inputs.skip.value(),
                                    inputs.initial_state.value(),
                                    inputs.resets,
                                    y.value(),
                                    final_state.value(),
                                    std::min(options.chunk_len, inputs.q.dim(1))};
  Tape* tape = Tape::recording({inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.value_scale,
                                inputs.skip, inputs.initial_state});
  const bool recurrent = use_recurrent(inputs, options, tape != nullptr);
  (recurrent ? recurrent_matrix_state_forward : chunked_matrix_state_forward)(device, args);

  if (tape != nullptr) {
    MatrixStateForwardArgs saved = args;
    saved.y = saved.final_state = Tensor();
    tape->record(
        {&y, &final_state}, [inputs, saved, recurrent, device](const std::vector<Tensor>& grad_outputs) {
          const Tensor grad_y = grad_outputs[0].defined() ? grad_outputs[0] : zeros_like(inputs.v.value());
          const MatrixStateBackwardArgs backward{saved,
                                                 grad_y,
                                                 grad_outputs[1],
                                                 empty_like(inputs.q.value()),
                                                 empty_like(inputs.k.value()),
                                                 empty_like(inputs.v.value()),
                                                 wanted(inputs.log_decay),
                                                 wanted(inputs.value_scale),
                                                 wanted(inputs.skip),
                                                 wanted(inputs.initial_state)};
          (recurrent ? recurrent_matrix_state_backward : chunked_matrix_state_backward)(device, backward);
          inputs.q.add_gradient(backward.grad_q);
          inputs.k.add_gradient(backward.grad_k);
          inputs.v.add_gradient(backward.grad_v);
          inputs.log_decay.add_gradient(backward.grad_log_decay);
          inputs.value_scale.add_gradient(backward.grad_value_scale);
          inputs.skip.add_gradient(backward.grad_skip);
          inputs.initial_state.add_gradient(backward.grad_initial_state);
        });
  }
  return {y, final_state};
}

}  // namespace headwater
