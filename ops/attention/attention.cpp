#include "ops/attention/attention.h"

#include <algorithm>
#include <cmath>

#include "autograd/tape.h"
#include "ops/attention/attention_kernels.h"
#include "ops/check.h"

namespace headwater {
namespace {

constexpr const char* op = "attention";

void check_arguments(const Variable& q, const Variable& k, const Variable& v, const Tensor& positions,
                     const AttentionOptions& options) {
  require(q.shape().n_axes() == 4, "{}: q has shape {}; it must be (batch, n_queries, n_heads, head_dim)", op,
          q.shape());
  require(q.dim(1) >= 1 && q.dim(2) >= 1 && q.dim(3) >= 1,
          "{}: q has shape {}; there must be a query, a head and a channel", op, q.shape());
  require(k.shape().n_axes() == 4 && k.dim(0) == q.dim(0) && k.dim(2) >= 1 && k.dim(3) == q.dim(3),
          "{}: k has shape {}; it must be (batch, n_keys, n_kv_heads, head_dim) with batch = {} and head_dim "
          "= {}",
          op, k.shape(), q.dim(0), q.dim(3));
  require(k.dim(1) >= q.dim(1), "{}: k has {} steps; they must end with those of the {} queries", op,
          k.dim(1), q.dim(1));
  require(q.dim(2) % k.dim(2) == 0, "{}: n_kv_heads is {}; it must divide n_heads = {}", op, k.dim(2),
          q.dim(2));
  check_shape(op, "v", v, k.shape(), "the shape of k");
  check_like(op, "k", k, q);
  check_like(op, "v", v, q);
  require(options.window >= -1, "{}: window is {}; it must be -1 (no limit) or more", op, options.window);
  if (!positions.defined()) return;
  const Shape expected{q.dim(0), q.dim(1)};
  require(positions.shape() == expected && positions.dtype() == DType::i32,
          "{}: positions is {} {}; it must be i32 (batch, n_queries) = {}", op, name_of(positions.dtype()),
          positions.shape(), expected);
  require(positions.device() == q.device(),
          "{}: positions are on {}; they must be on {} like the other arguments", op,
          to_string(positions.device()), to_string(q.device()));
}

}  // namespace

// With g = grad_y, and P from the scores and the saved log of their sum, P = exp(S - log_sum):
//   grad_v[s] = sum_t P[t,s] g[t]                     dP[t,s] = g[t] . v[s]
//   dS = P o (dP - delta),  delta[t] = sum_s P[t,s] dP[t,s] = g[t] . y[t]
//   grad_q[t] = scale sum_s dS[t,s] k[s]              grad_k[s] = scale sum_t dS[t,s] q[t]
// grad_k and grad_v are summed over the queries' heads that read them.
Variable attention(const Variable& q, const Variable& k, const Variable& v, const Tensor& positions,
                   const AttentionOptions& options) {
  check_arguments(q, k, v, positions, options);
  const int64_t n_keys = k.dim(1);
  Variable y(empty_like(q.value()));
  const AttentionForwardArgs forward{
      q.value(),
      k.value(),
      v.value(),
      positions,
      y.value(),
      Tensor::empty({q.dim(0), q.dim(2), q.dim(1)}, compute_dtype(q.dtype()), q.device()),
      options.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.dim(3)))),
      options.window < 0 ? n_keys : std::min(options.window, n_keys)};
  attention_forward(q.device(), forward);

  if (Tape* tape = Tape::recording({q, k, v})) {
    tape->record({&y}, [q, k, v, forward](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_q = empty_like(forward.q), grad_k = empty_like(forward.k),
                   grad_v = empty_like(forward.v);
      attention_backward(q.device(), {forward, grad_outputs[0], grad_q, grad_k, grad_v});
      q.add_gradient(grad_q);
      k.add_gradient(grad_k);
      v.add_gradient(grad_v);
    });
  }
  return y;
}

}  // namespace headwater
