#include "ops/token_shift/token_shift.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/token_shift/token_shift_kernels.h"

namespace headwater {
namespace {

constexpr const char* op = "token_shift";

void check_arguments(const Variable& x, const std::vector<Variable>& mixes, const Variable& initial_state,
                     const Tensor& resets) {
  require(x.shape().n_axes() == 3, "{}: x has shape {}; it must be (batch, length, channels)", op, x.shape());
  require(x.dim(1) >= 1, "{}: length is 0; a sequence has at least one step", op);
  require(!mixes.empty() && mixes.size() <= token_shift_max_mixes,
          "{}: there are {} mixes; 1 to {} can be made at once", op, mixes.size(), token_shift_max_mixes);
  for (const Variable& mix : mixes) {
    check_shape(op, "a mix", mix, {x.dim(2)}, "(channels)");
    check_parameter(op, "a mix", mix, x);
  }
  if (initial_state.defined()) {
    check_shape(op, "initial_state", initial_state, {x.dim(0), x.dim(2)}, "(batch, channels)");
    check_like(op, "initial_state", initial_state, x);
  }
  check_resets(op, resets, x.dim(0), x.dim(1));
  require(!resets.defined() || resets.device() == x.device(),
          "{}: resets are on {}; they must be on {} like the other arguments", op, to_string(resets.device()),
          to_string(x.device()));
}

TokenShiftTensors values_of(const std::vector<Variable>& variables) {
  TokenShiftTensors tensors;
  for (size_t i = 0; i < variables.size(); ++i) tensors[i] = variables[i].value();
  return tensors;
}

}  // namespace

// With g_i the gradient of y_i, and 0 for x[t-1] and for what step t gives it where step t starts a document:
//   grad_x[t]     = sum_i mixes[i] g_i[t] + (1 - mixes[i]) g_i[t+1],   and grad_final_state at the last step
//   grad_mixes[i] = sum over steps and sequences of (x[t] - x[t-1]) g_i[t]
TokenShiftOutput token_shift(const Variable& x, const std::vector<Variable>& mixes,
                             const Variable& initial_state, const Tensor& resets) {
  check_arguments(x, mixes, initial_state, resets);
  const int n_mixes = static_cast<int>(mixes.size());
  std::vector<Variable> outputs;
  for (int i = 0; i < n_mixes; ++i) outputs.emplace_back(empty_like(x.value()));
  outputs.emplace_back(Tensor::empty({x.dim(0), x.dim(2)}, x.dtype(), x.device()));
  const std::vector<Variable> y(outputs.begin(), outputs.end() - 1);
  token_shift_forward(x.device(), {x.value(), values_of(mixes), initial_state.value(), resets, values_of(y),
                                   outputs.back().value(), n_mixes});

  Tape* tape = Tape::recording({x, initial_state});
  for (const Variable& mix : mixes) tape = tape != nullptr ? tape : Tape::recording({mix});
  if (tape != nullptr) {
    std::vector<Variable*> recorded;
    for (Variable& output : outputs) recorded.push_back(&output);
    tape->record(recorded, [=](const std::vector<Tensor>& grad_outputs) {
      TokenShiftBackwardArgs args{.x = x.value(),
                                  .mixes = values_of(mixes),
                                  .initial_state = initial_state.value(),
                                  .resets = resets,
                                  .grad_y = {},
                                  .grad_final_state = grad_outputs.back(),
                                  .grad_x = empty_like(x.value()),
                                  .grad_initial_state = {},
                                  .grad_mixes = {},
                                  .accumulate = {},
                                  .n_mixes = n_mixes};
      if (initial_state.defined()) args.grad_initial_state = empty_like(initial_state.value());
      for (int i = 0; i < n_mixes; ++i) {
        const Gradient::Target target = gradient_target(mixes[i]);
        args.grad_y[i] = grad_outputs[i];
        args.grad_mixes[i] = target.tensor;
        args.accumulate[i] = target.accumulate;
      }
      token_shift_backward(x.device(), args);
      x.add_gradient(args.grad_x);
      initial_state.add_gradient(args.grad_initial_state);
    });
  }
  return {{outputs.begin(), outputs.end() - 1}, outputs.back()};
}

}  // namespace headwater
