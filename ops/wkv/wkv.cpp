#include "ops/wkv/wkv.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/wkv/wkv_kernels.h"

namespace headwater {
namespace {

constexpr const char* op = "wkv";

void check_arguments(const WkvInputs& in) {
  const Shape& shape = in.k.shape();
  require(shape.n_axes() == 3, "{}: k has shape {}; it must be (batch, length, channels)", op, shape);
  require(shape[1] >= 1, "{}: length is 0; a sequence has at least one step", op);
  check_shape(op, "v", in.v, shape, "(batch, length, channels)");
  check_like(op, "v", in.v, in.k);
  check_shape(op, "time_decay", in.time_decay, {shape[2]}, "(channels)");
  check_parameter(op, "time_decay", in.time_decay, in.k);
  check_shape(op, "time_first", in.time_first, {shape[2]}, "(channels)");
  check_parameter(op, "time_first", in.time_first, in.k);
  if (in.initial_state.defined()) {
    check_shape(op, "initial_state", in.initial_state, {shape[0], 2, shape[2]}, "(batch, 2, channels)");
    check_parameter(op, "initial_state", in.initial_state, in.k);
  }
  check_resets(op, in.resets, shape[0], shape[1]);
  require(!in.resets.defined() || in.resets.device() == in.k.device(),
          "{}: resets are on {}; they must be on {} like the other arguments", op,
          to_string(in.resets.device()), to_string(in.k.device()));
}

}  // namespace

// One channel, with (a, l) the state before step t, (a', l') that after it, and s the logistic function:
//   p = s(u + k - l)        y  = (1-p) a + p v
//   q = s(k - (l - w))      a' = (1-q) a + q v,   l' = log(e^(l-w) + e^k)
// With gy, ga', gl' the gradients of y, a', l', and those of the two sigmoids' arguments
//   gp = gy p (1-p) (v - a),   gq = ga' q (1-q) (v - a):
//   gv = gy p + ga' q               gk = gp + gq + gl' q
//   ga = gy (1-p) + ga' (1-q)       gl = -gp - gq + gl' (1-q)
//   gu = gp, gw = gq - gl' (1-q), summed over steps and sequences,   grad_time_decay = w gw
// Without a past p = q = 1 exactly, so that nothing reaches what is before a reset. All factors lie in [0, 1] but
// v - a, which is taken before anything is subtracted from it: it does not cancel when one step dominates.
WkvOutput wkv(const WkvInputs& in) {
  check_arguments(in);
  const int64_t batch = in.k.dim(0), length = in.k.dim(1), channels = in.k.dim(2);
  const DType state_dtype = compute_dtype(in.k.dtype());
  const int64_t n_stretches = (length + wkv_stretch - 1) / wkv_stretch;
  const Tensor borders = Tensor::empty({batch, n_stretches, 2, channels}, state_dtype, in.k.device());
  Variable y(empty_like(in.k.value()));
  Variable final_state(Tensor::empty({batch, 2, channels}, state_dtype, in.k.device()));
  wkv_forward(in.k.device(), {in.k.value(), in.v.value(), in.time_decay.value(), in.time_first.value(),
                              in.initial_state.value(), in.resets, y.value(), final_state.value(), borders});

  if (Tape* tape = Tape::recording({in.k, in.v, in.time_decay, in.time_first, in.initial_state})) {
    tape->record({&y, &final_state},
                 [k = in.k, v = in.v, time_decay = in.time_decay, time_first = in.time_first,
                  initial_state = in.initial_state.without_value(), has_state = in.initial_state.defined(),
                  resets = in.resets, borders](const std::vector<Tensor>& grad_outputs) {
                   const Tensor grad_k = empty_like(k.value()), grad_v = empty_like(v.value());
                   const Tensor grad_initial =
                       has_state ? Tensor::empty({k.dim(0), 2, k.dim(2)}, borders.dtype(), k.device())
                                 : Tensor();
                   const Gradient::Target grad_decay = gradient_target(time_decay);
                   const Gradient::Target grad_first = gradient_target(time_first);
                   wkv_backward(k.device(), {k.value(), v.value(), time_decay.value(), time_first.value(),
                                             resets, borders, grad_outputs[0], grad_outputs[1], grad_k,
                                             grad_v, grad_initial, grad_decay.tensor, grad_first.tensor,
                                             grad_decay.accumulate, grad_first.accumulate});
                   k.add_gradient(grad_k);
                   v.add_gradient(grad_v);
                   initial_state.add_gradient(grad_initial);
                 });
  }
  return {y, final_state};
}

}  // namespace headwater
