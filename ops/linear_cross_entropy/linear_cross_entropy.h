// The last layer of a language model and its loss, without ever holding all logits.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// The target of a row that does not count: padding, or a token that is not to be learned.
inline constexpr int32_t ignored_target = -1;

struct LinearCrossEntropyOptions {
  /// How many rows' logits are held at once; 0: as many as fit 16 MB (256 MB on a GPU), at least 128.
  int64_t row_block = 0;
  /// What the sum of the row losses is divided by: the number of targets over all micro-batches of an
  /// accumulated step, so that every target weighs the same; 0: the number of targets of this call.
  int64_t divisor = 0;
  /// The same, i64 () beside hidden, read when the kernel runs: for a step that is recorded once and run with other
  /// targets. Instead of `divisor`; undefined: that.
  Tensor divisor_tensor = {};
};

struct LinearCrossEntropyOutput {
  Variable loss;       ///< (), differentiable; 0 if no target counts
  Tensor row_losses;   ///< (rows), the dtype of loss; not divided; 0 where ignored; no gradient
  Tensor row_correct;  ///< (rows), u8: 1 where the first largest logit is the target's; 0 where ignored
  Tensor n_targets;    ///< (), i64: how many targets count
};

/// Linear layer without bias, softmax, negative log-likelihood, mean.
///
///   logits[r, v]  = sum_j hidden[r, j] weight[v, j]
///   row_losses[r] = log(sum_v exp(logits[r, v])) - logits[r, targets[r]]
///   loss          = sum over the rows that count of row_losses[r] / divisor
///
/// The rows are walked in blocks, so (row_block, vocab_size) logits is all that is ever held. On a CPU these are the rows
/// that count; on a GPU, where the host does not wait to know them, ignored rows cost as much as others.
/// While a tape records, each block's gradients are computed as soon as its logits are known, and the
/// backward pass only scales them: the logits are computed once, and nothing of that size is saved.
///
/// Shapes   hidden: (rows, d_model) or (batch, length, d_model), with rows = batch * length; weight:
///          (vocab_size, d_model); targets: one per row, in any shape.
/// Values   0 <= target < vocab_size, or ignored_target. What stands in an ignored row is not read; its
///          gradient is 0. A logit that is not finite makes the loss NaN or infinite, and nothing else fails.
/// Dtypes   hidden, weight: f32, f64; bf16 on a GPU, where logits, losses and the gradient of weight are f32. targets:
///          i32. The sums over the vocabulary (on a CPU) and over the rows end in double.
/// Grads    to hidden and weight, each only if wanted. Saves the gradients themselves: the memory of hidden
///          and of weight once more, until the backward has run.
/// Repeat   same inputs and number of threads, same bits; another row_block may round otherwise.
/// Throws   an input error for a wrong shape or dtype, or for a target outside the vocabulary; the text names
///          the argument, or the row and its target. On a GPU such a target makes the loss NaN instead.
LinearCrossEntropyOutput linear_cross_entropy(const Variable& hidden, const Variable& weight,
                                              const Tensor& targets,
                                              const LinearCrossEntropyOptions& options = {});

}  // namespace headwater
