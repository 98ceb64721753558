#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/linear_cross_entropy/linear_cross_entropy_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& hidden, const Variable& weight, const Tensor& targets,
                     const LinearCrossEntropyOptions& options) {
  const char* op = "linear_cross_entropy";
  require(hidden.shape().n_axes() >= 1, "{}: hidden is a scalar; it must be (..., d_model)", op);
  const int64_t d_model = hidden.dim(-1);
  require(weight.shape().n_axes() == 2 && weight.dim(1) == d_model,
          "{}: weight has shape {}; it must be (vocab_size, d_model) with d_model = {}, as in hidden", op,
          weight.shape(), d_model);
  check_like(op, "weight", weight, hidden);
  const int64_t rows = rows_of(hidden.shape());
  require(targets.dtype() == DType::i32, "{}: targets are {}; they must be i32", op,
          name_of(targets.dtype()));
  require(targets.device() == hidden.device(),
          "{}: targets are on {}; they must be on {} like the other arguments", op,
          to_string(targets.device()), to_string(hidden.device()));
  require(targets.numel() == rows, "{}: targets have shape {}; hidden has {} rows, and each needs one target",
          op, targets.shape(), rows);
  require(options.row_block >= 0, "{}: row_block is {}; it must be >= 0", op, options.row_block);
  require(options.divisor >= 0, "{}: divisor is {}; it must be >= 0", op, options.divisor);
  const Tensor& divisor = options.divisor_tensor;
  require(!divisor.defined() || (divisor.shape() == Shape{} && divisor.dtype() == DType::i64 &&
                                 divisor.device() == hidden.device() && options.divisor == 0),
          "{}: divisor_tensor is {} {} on {}; it must be i64 () on {}, and divisor 0", op,
          name_of(divisor.dtype()), divisor.shape(), to_string(divisor.device()), to_string(hidden.device()));
}

/// Only of targets that the host can read: looking at a GPU's would wait for it.
void check_targets(const Tensor& targets, int64_t vocab_size) {
  if (!targets.device().is_cpu()) return;
  const int32_t* target = targets.data<int32_t>();
  for (int64_t row = 0; row < targets.numel(); ++row) {
    require(target[row] == ignored_target || (target[row] >= 0 && target[row] < vocab_size),
            "linear_cross_entropy: the target of row {} is {}; it must be 0 to {}, or {} for a row that does "
            "not count",
            row, target[row], vocab_size - 1, ignored_target);
  }
}

}  // namespace

// With p = softmax(logits) and one = 1 at the target, for each row that counts:
//   grad_logits[r, v] = (p[r, v] - one[r, v]) / divisor
//   grad_hidden       = grad_logits weight
//   grad_weight       = grad_logits^T hidden
// These are linear in the gradient of the loss, a scalar: the forward computes them for 1, the backward
// scales.
LinearCrossEntropyOutput linear_cross_entropy(const Variable& hidden, const Variable& weight,
                                              const Tensor& targets,
                                              const LinearCrossEntropyOptions& options) {
  check_arguments(hidden, weight, targets, options);
  check_targets(targets, weight.dim(0));
  const DType loss_dtype = compute_dtype(hidden.dtype());
  const Device device = hidden.device();
  LinearCrossEntropyOutput output;
  output.loss = Variable(Tensor::empty({}, loss_dtype, device));
  output.row_losses = Tensor::empty({targets.numel()}, loss_dtype, device);
  output.row_correct = Tensor::empty({targets.numel()}, DType::u8, device);
  output.n_targets = Tensor::empty({}, DType::i64, device);
  Tape* tape = Tape::recording({hidden, weight});
  const bool want_grad_hidden = tape != nullptr && hidden.requires_gradient();
  const bool want_grad_weight = tape != nullptr && weight.requires_gradient();
  const Tensor grad_hidden = want_grad_hidden ? empty_like(hidden.value()) : Tensor();
  const Tensor grad_weight =
      want_grad_weight ? Tensor::empty(weight.shape(), compute_dtype(weight.dtype()), device) : Tensor();
  const Tensor divisor_tensor = options.divisor_tensor.defined() ? options.divisor_tensor : output.n_targets;
  linear_cross_entropy_forward(device, {hidden.value(), weight.value(), targets, output.loss.value(),
                                        output.row_losses, output.row_correct, output.n_targets, grad_hidden,
                                        grad_weight, options.row_block, options.divisor, divisor_tensor});

  if (tape != nullptr) {
    tape->record(
        {&output.loss}, [hidden, weight, grad_hidden, grad_weight](const std::vector<Tensor>& grad_outputs) {
          linear_cross_entropy_backward(hidden.device(), {grad_outputs[0], grad_hidden, grad_weight});
          hidden.add_gradient(grad_hidden);
          weight.add_gradient(grad_weight);
        });
  }
  return output;
}

}  // namespace headwater
