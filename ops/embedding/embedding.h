// Rows of a table, looked up by token.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// Embedding: each token is replaced by its row of the weight.
///
///   y[..., j] = weight[tokens[...], j]
///
/// Shapes   tokens: (batch, length), or any other   weight: (vocab_size, d_model)   y: (shape of tokens,
///          d_model).
/// Values   0 <= token < vocab_size.
/// Dtypes   tokens: i32; weight: f32, f64.
/// Grads    to weight: the rows of grad_y are added where they were looked up. Keeps the tokens, saves
///          nothing else.
/// Repeat   same inputs, same bits, whatever the number of threads: a row's gradients are added in the order
///          of the positions, without atomics.
/// Throws   an input error for a wrong shape or dtype, or for a token outside the vocabulary; the text names
///          the argument, or the token and its position.
Variable embedding(const Tensor& tokens, const Variable& weight);

}  // namespace headwater
