#include "ops/selective_scan/selective_scan.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace headwater {
namespace {

constexpr const char* op = "selective_scan";

void check_parameters(const SelectiveScanInputs& in, int64_t batch, int64_t d_inner) {
  require(in.A.shape().n_axes() == 2 && in.A.dim(0) == d_inner && in.A.dim(1) >= 1,
          "{}: A has shape {}; it must be (d_inner, d_state) with d_inner = {}", op, in.A.shape(), d_inner);
  check_parameter(op, "A", in.A, in.x);
  if (in.D.defined()) {
    check_shape(op, "D", in.D, {d_inner}, "(d_inner)");
    check_parameter(op, "D", in.D, in.x);
  }
  if (in.dt_bias.defined()) {
    check_shape(op, "dt_bias", in.dt_bias, {d_inner}, "(d_inner)");
    check_parameter(op, "dt_bias", in.dt_bias, in.x);
  }
  if (in.initial_state.defined()) {
    check_shape(op, "initial_state", in.initial_state, {batch, d_inner, in.A.dim(1)},
                "(batch, d_inner, d_state)");
    check_parameter(op, "initial_state", in.initial_state, in.x);
  }
}

void check_maps(const SelectiveScanInputs& in, int64_t batch, int64_t length, int64_t d_inner) {
  const int64_t d_state = in.A.dim(1);
  const Shape& shape = in.B.shape();
  require(
      shape.n_axes() == 4 && shape[0] == batch && shape[1] == length && shape[3] == d_state,
      "{}: B has shape {}; it must be (batch, length, n_groups, d_state) = ({}, {}, n_groups, {}), d_state "
      "from A",
      op, shape, batch, length, d_state);
  require(shape[2] >= 1 && d_inner % shape[2] == 0,
          "{}: {} channels cannot share {} groups of B and C; d_inner must be a multiple of n_groups", op,
          d_inner, shape[2]);
  check_like(op, "B", in.B, in.x);
  check_shape(op, "C", in.C, shape, "the shape of B");
  check_like(op, "C", in.C, in.x);
}

void check_arguments(const SelectiveScanInputs& in) {
  require(in.x.shape().n_axes() == 3, "{}: x has shape {}; it must be (batch, length, d_inner)", op,
          in.x.shape());
  const int64_t batch = in.x.dim(0), length = in.x.dim(1), d_inner = in.x.dim(2);
  require(length >= 1, "{}: length is 0; a sequence has at least one step", op);
  check_shape(op, "dt", in.dt, in.x.shape(), "(batch, length, d_inner)");
  check_like(op, "dt", in.dt, in.x);
  check_parameters(in, batch, d_inner);
  check_maps(in, batch, length, d_inner);
  if (in.z.defined()) {
    check_shape(op, "z", in.z, in.x.shape(), "(batch, length, d_inner)");
    check_like(op, "z", in.z, in.x);
  }
  check_resets(op, in.resets, batch, length);
  require(!in.resets.defined() || in.resets.device() == in.x.device(),
          "{}: resets are on {}; they must be on {} like the other arguments", op,
          to_string(in.resets.device()), to_string(in.x.device()));
}

/// The states that the backward starts its stretches from.
Tensor make_saved_states(const SelectiveScanInputs& in) {
  const int64_t stretch = in.x.device().is_cpu() ? selective_scan_stretch_cpu : selective_scan_stretch_cuda;
  const int64_t n_stretches = (in.x.dim(1) + stretch - 1) / stretch;
  return Tensor::empty({in.x.dim(0), n_stretches, in.A.dim(1), in.x.dim(2)}, in.A.dtype(), in.x.device());
}

Tensor wanted(const Variable& input) {
  return input.requires_gradient() ? empty_like(input.value()) : Tensor();
}

SelectiveScanBackwardArgs backward_args(const SelectiveScanInputs& in, const SelectiveScanForwardArgs& saved,
                                        const std::vector<Tensor>& grad_outputs) {
  return {.forward = saved,
          .grad_y = grad_outputs[0].defined() ? grad_outputs[0] : zeros_like(in.x.value()),
          .grad_final_state = grad_outputs[1],
          .grad_x = empty_like(in.x.value()),
          .grad_dt = empty_like(in.x.value()),
          .grad_B = empty_like(in.B.value()),
          .grad_C = empty_like(in.B.value()),
          .grad_z = in.z.defined() ? empty_like(in.z.value()) : Tensor(),
          .grad_A = wanted(in.A),
          .grad_D = wanted(in.D),
          .grad_dt_bias = wanted(in.dt_bias),
          .grad_initial_state = wanted(in.initial_state)};
}

}  // namespace

// For one channel, with a[t] = exp(dt'[t] A), v = dt' x, s[t] = sum_n C h + D x (y before the gate),
// g = grad_y silu(z), and gh[t] the gradient of h[t]:
//   gh[t]     = C[t] g[t] + a[t+1] gh[t+1]        beyond the end: grad_final_state; a = 0 where a document starts
//   grad_C[t] = sum_d g[t] h[t]                   grad_B[t] = sum_d gh[t] v[t]          sums over a group's channels
//   grad_v[t] = sum_n gh[t] B[t]                  grad_x[t] = D g[t] + dt'[t] grad_v[t]
//   grad_dt'  = x grad_v + sum_n gh A r           grad_A    = sum_t gh dt' r,           r[t] = a[t] h[t-1]
//   grad_z    = grad_y s silu'(z)                 grad_D    = sum_t g x                 grad_initial_state = a[0] gh[0]
// softplus: grad_dt = grad_dt' sigmoid(dt + dt_bias), grad_dt_bias its sum over t.
SelectiveScanOutput selective_scan(const SelectiveScanInputs& inputs, const SelectiveScanOptions& options) {
  check_arguments(inputs);
  const Device device = inputs.x.device();
  Tape* tape = Tape::recording({inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z,
                                inputs.dt_bias, inputs.initial_state});
  Variable y(empty_like(inputs.x.value()));
  Variable final_state(
      Tensor::empty({inputs.x.dim(0), inputs.x.dim(2), inputs.A.dim(1)}, inputs.A.dtype(), device));
  const SelectiveScanForwardArgs args{.x = inputs.x.value(),
                                      .dt = inputs.dt.value(),
                                      .A = inputs.A.value(),
                                      .B = inputs.B.value(),
                                      .C = inputs.C.value(),
                                      .D = inputs.D.value(),
                                      .z = inputs.z.value(),
                                      .dt_bias = inputs.dt_bias.value(),
                                      .initial_state = inputs.initial_state.value(),
                                      .resets = inputs.resets,
                                      .y = y.value(),
                                      .final_state = final_state.value(),
                                      .saved_states = tape != nullptr ? make_saved_states(inputs) : Tensor(),
                                      .softplus = options.softplus};
  selective_scan_forward(device, args);

  if (tape != nullptr) {
    SelectiveScanForwardArgs saved = args;
    saved.y = saved.final_state = Tensor();
    tape->record({&y, &final_state}, [inputs, saved, device](const std::vector<Tensor>& grad_outputs) {
      const SelectiveScanBackwardArgs backward = backward_args(inputs, saved, grad_outputs);
      selective_scan_backward(device, backward);
      inputs.x.add_gradient(backward.grad_x);
      inputs.dt.add_gradient(backward.grad_dt);
      inputs.A.add_gradient(backward.grad_A);
      inputs.B.add_gradient(backward.grad_B);
      inputs.C.add_gradient(backward.grad_C);
      inputs.D.add_gradient(backward.grad_D);
      inputs.z.add_gradient(backward.grad_z);
      inputs.dt_bias.add_gradient(backward.grad_dt_bias);
      inputs.initial_state.add_gradient(backward.grad_initial_state);
    });
  }
  return {y, final_state};
}

}  // namespace headwater
