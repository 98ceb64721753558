// Causal softmax attention over documents, with grouped queries, a window, and keys of earlier pieces.
#pragma once

#include <optional>

#include "autograd/variable.h"

namespace headwater {

struct AttentionOptions {
  std::optional<double> scale = {};  ///< factor of the scores; absent: 1 / sqrt(head_dim)
  int64_t window = -1;               ///< how many steps before its own a query sees; -1: no limit
};

/// Softmax attention of each query to its own step and to earlier ones of its document.
///
///   y[b,t,h] = sum_s P[t,s] v[b,s,g],   P[t,s] = exp(S[t,s]) / sum_r exp(S[t,r]),   S[t,s] = scale q[b,t,h] . k[b,s,g]
///
/// with g = h / (n_heads / n_kv_heads). The queries are the last n_queries steps of the n_keys: query t stands at step
/// own = n_keys - n_queries + t. It sees the steps s with own - min(window, positions[b,t]) <= s <= own: positions counts
/// the steps of its document before it, of which all, or the last ones, must be among the keys.
///
/// Source   Vaswani et al. 2017, arXiv:1706.03762; in tiles with a running maximum and sum: Dao 2023, arXiv:2307.08691;
///          grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
/// Shapes   q: (batch, n_queries, n_heads, head_dim)   k, v: (batch, n_keys, n_kv_heads, head_dim), n_keys >= n_queries
///          positions: i32 (batch, n_queries), may be absent: a query then sees the keys from the first on
///          y: the shape of q.   positions as document_positions() gives them: they rise by at most 1 a step.
/// Dtypes   f32, f64; bf16 on a GPU, with scores, sums and accumulators in f32.
/// Grads    to q, k and v. Saves y and one number per row and head besides its inputs: memory is linear in the length.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape, dtype or device; the text names the argument.
Variable attention(const Variable& q, const Variable& k, const Variable& v, const Tensor& positions = {},
                   const AttentionOptions& options = {});

}  // namespace headwater
