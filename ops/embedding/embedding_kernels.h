// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct EmbeddingForwardArgs {
  Tensor tokens;  // (n_tokens), each below vocab_size
  Tensor weight;  // (vocab_size, d_model)
  Tensor y;       // (n_tokens, d_model), written
};

struct EmbeddingBackwardArgs {
  Tensor tokens;       // (n_tokens)
  Tensor grad_y;       // (n_tokens, d_model)
  Tensor grad_weight;  // (vocab_size, d_model), written or added to
  bool accumulate_weight;
};

void embedding_forward_cpu(const EmbeddingForwardArgs& args);
void embedding_backward_cpu(const EmbeddingBackwardArgs& args);

inline constexpr Kernel<EmbeddingForwardArgs> embedding_forward{"embedding_forward", embedding_forward_cpu};
inline constexpr Kernel<EmbeddingBackwardArgs> embedding_backward{"embedding_backward",
                                                                  embedding_backward_cpu};

}  // namespace headwater
