// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct AttentionForwardArgs {
  Tensor q;          // (batch, n_queries, n_heads, head_dim)
  Tensor k, v;       // (batch, n_keys, n_kv_heads, head_dim)
  Tensor positions;  // i32 (batch, n_queries) or undefined
  Tensor y;          // as q, written
  Tensor
      log_sums;  // (batch, n_heads, n_queries), of the dtype of the arithmetic, written: log of sum_s exp(S[t,s])
  double scale;
  int64_t window;  // at most n_keys
};

struct AttentionBackwardArgs {
  AttentionForwardArgs forward;   // all of it is read
  Tensor grad_y;                  // as y
  Tensor grad_q, grad_k, grad_v;  // as q, k and v, written
};

void attention_forward_cpu(const AttentionForwardArgs& args);
void attention_forward_cuda(const AttentionForwardArgs& args);
void attention_backward_cpu(const AttentionBackwardArgs& args);
void attention_backward_cuda(const AttentionBackwardArgs& args);

inline constexpr Kernel<AttentionForwardArgs> attention_forward{"attention_forward", attention_forward_cpu,
                                                                HEADWATER_CUDA(attention_forward_cuda)};
inline constexpr Kernel<AttentionBackwardArgs> attention_backward{
    "attention_backward", attention_backward_cpu, HEADWATER_CUDA(attention_backward_cuda)};

}  // namespace headwater
