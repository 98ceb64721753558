#include "core/matrix_block.h"
#include "core/parallel.h"
#include "ops/check.h"
#include "ops/divide_by_last/divide_by_last_kernels.h"

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 64;

template <class T>
void forward(const DivideByLastForwardArgs& args) {
  const int64_t d = args.y.dim(-1);
  parallel_for(rows_of(args.x.shape()), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = args.x.data<T>() + row * (d + 1);
      T* y = args.y.data<T>() + row * d;
      const T r = T{1} / (x[d] + static_cast<T>(args.epsilon));
      for (int64_t j = 0; j < d; ++j) y[j] = x[j] * r;
    }
  });
}

template <class T>
void backward(const DivideByLastBackwardArgs& args) {
  const int64_t d = args.grad_y.dim(-1);
  parallel_for(rows_of(args.x.shape()), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = args.x.data<T>() + row * (d + 1);
      const T* grad_y = args.grad_y.data<T>() + row * d;
      T* grad_x = args.grad_x.data<T>() + row * (d + 1);
      const T r = T{1} / (x[d] + static_cast<T>(args.epsilon));
      for (int64_t j = 0; j < d; ++j) grad_x[j] = grad_y[j] * r;
      grad_x[d] = -r * dot_product(grad_x, x, d);
    }
  });
}

}  // namespace

void divide_by_last_forward_cpu(const DivideByLastForwardArgs& args) {
  dispatch_real(args.x.dtype(), "divide_by_last", [&](auto element) { forward<decltype(element)>(args); });
}

void divide_by_last_backward_cpu(const DivideByLastBackwardArgs& args) {
  dispatch_real(args.x.dtype(), "divide_by_last", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
