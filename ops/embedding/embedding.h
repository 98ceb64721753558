// Rows of a table, looked up by token.
#pragma once

#include <optional>

#include "autograd/variable.h"

namespace headwater {

struct EmbeddingOptions {
  std::optional<DType> output_dtype =
      {};  ///< absent: the weight's. A bf16 table feeds an f32 residual stream
};

/// Embedding: each token is replaced by its row of the weight.
///
///   y[..., j] = weight[tokens[...], j]
///
/// Shapes   tokens: (batch, length), or any other   weight: (vocab_size, d_model)   y: (shape of tokens,
///          d_model).
/// Values   0 <= token < vocab_size. Tokens on a GPU are not looked at by the host; one outside gives a row of NaN
///          there, and no gradient.
/// Dtypes   tokens: i32; weight: f32, f64; on a GPU weight and y each f32 or bf16, the gradient of weight f32.
/// Grads    to weight: the rows of grad_y are added where they were looked up. Keeps the tokens, saves
///          nothing else.
/// Repeat   same inputs, same bits, whatever the number of threads, without atomics: a row's gradients are added in the
///          order of the positions; on a GPU in up to 8 running sums, which take them in turn and are added in order.
/// Throws   an input error for a wrong shape or dtype, or for a token outside the vocabulary; the text names
///          the argument, or the token and its position.
Variable embedding(const Tensor& tokens, const Variable& weight, const EmbeddingOptions& options = {});

}  // namespace headwater
