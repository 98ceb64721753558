// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct EmbeddingForwardArgs {
  Tensor tokens;  // (n_tokens), each below vocab_size
  Tensor weight;  // (vocab_size, d_model)
  Tensor y;       // (n_tokens, d_model), written; on a GPU of any dtype, else the weight's
};

struct EmbeddingBackwardArgs {
  Tensor tokens;       // (n_tokens)
  Tensor grad_y;       // (n_tokens, d_model)
  Tensor grad_weight;  // (vocab_size, d_model), written or added to; f32 on a GPU
  bool accumulate_weight;
};

void embedding_forward_cpu(const EmbeddingForwardArgs& args);
void embedding_forward_cuda(const EmbeddingForwardArgs& args);
void embedding_backward_cpu(const EmbeddingBackwardArgs& args);
void embedding_backward_cuda(const EmbeddingBackwardArgs& args);

inline constexpr Kernel<EmbeddingForwardArgs> embedding_forward{"embedding_forward", embedding_forward_cpu,
                                                                HEADWATER_CUDA(embedding_forward_cuda)};
inline constexpr Kernel<EmbeddingBackwardArgs> embedding_backward{
    "embedding_backward", embedding_backward_cpu, HEADWATER_CUDA(embedding_backward_cuda)};

}  // namespace headwater
