#include <algorithm>

#include "core/parallel.h"
#include "ops/embedding/embedding_kernels.h"

namespace headwater {
namespace {

constexpr int64_t elements_per_task = 16384;

template <class T>
void forward(const EmbeddingForwardArgs& args) {
  const int64_t d_model = args.weight.dim(1);
  const int32_t* tokens = args.tokens.data<int32_t>();
  const T* weight = args.weight.data<T>();
  T* y = args.y.data<T>();
  const int64_t tokens_per_task = 1 + elements_per_task / std::max<int64_t>(1, d_model);
  parallel_for(args.tokens.numel(), tokens_per_task, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::copy_n(weight + tokens[i] * d_model, d_model, y + i * d_model);
  });
}

/// Threads share the columns, not the tokens: each element of grad_weight has one writer, which adds in the
/// order of the positions.
template <class T>
void backward(const EmbeddingBackwardArgs& args) {
  constexpr int64_t columns_per_unit = 64 / sizeof(T);  // one cache line, so that threads do not share any
  const int64_t n_tokens = args.tokens.numel();
  const int64_t d_model = args.grad_weight.dim(1);
  const int32_t* tokens = args.tokens.data<int32_t>();
  const T* grad_y = args.grad_y.data<T>();
  T* grad_weight = args.grad_weight.data<T>();
  if (!args.accumulate_weight) args.grad_weight.zero();
  const int64_t n_units = (d_model + columns_per_unit - 1) / columns_per_unit;
  const int64_t units_per_task = 1 + elements_per_task / std::max<int64_t>(1, n_tokens * columns_per_unit);
  parallel_for(n_units, units_per_task, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * columns_per_unit;
    const int64_t last = std::min(d_model, end * columns_per_unit);
    for (int64_t i = 0; i < n_tokens; ++i) {
      const T* from = grad_y + i * d_model;
      T* to = grad_weight + tokens[i] * d_model;
      for (int64_t j = first; j < last; ++j) to[j] += from[j];
    }
  });
}

}  // namespace

void embedding_forward_cpu(const EmbeddingForwardArgs& args) {
  dispatch_real(args.weight.dtype(), "embedding", [&](auto element) { forward<decltype(element)>(args); });
}

void embedding_backward_cpu(const EmbeddingBackwardArgs& args) {
  dispatch_real(args.grad_weight.dtype(), "embedding",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
