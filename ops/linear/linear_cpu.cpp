#include "core/gemm.h"
#include "core/parallel.h"
#include "ops/check.h"
#include "ops/linear/linear_kernels.h"

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 64;

template <class T>
void forward(const LinearForwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape());
  const int64_t d_in = args.weight.dim(1);
  const int64_t d_out = args.weight.dim(0);
  T* y = args.y.data<T>();
  gemm<T>(false, true, rows, d_out, d_in, T{1}, args.x.data<T>(), d_in, args.weight.data<T>(), d_in, T{0}, y,
          d_out);
  if (!args.bias.defined()) return;
  const T* bias = args.bias.data<T>();
  parallel_for(rows, rows_per_task, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < d_out; ++j) y[row * d_out + j] += bias[j];
    }
  });
}

template <class T>
void sum_rows(const T* values, int64_t rows, int64_t width, bool accumulate, T* target) {
  const RowBlocks blocks(rows);
  const Tensor partial = Tensor::zeros({blocks.n_blocks, width}, DTypeOf<T>::value);
  parallel_for_each(blocks.n_blocks, [&](int64_t block) {
    T* sums = partial.data<T>() + block * width;
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
      for (int64_t j = 0; j < width; ++j) sums[j] += values[row * width + j];
    }
  });
  sum_blocks(partial.data<T>(), blocks.n_blocks, width, accumulate, target);
}

template <class T>
void backward(const LinearBackwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape());
  const int64_t d_in = args.weight.dim(1);
  const int64_t d_out = args.weight.dim(0);
  const T* grad_y = args.grad_y.data<T>();
  if (args.grad_x.defined()) {
    gemm<T>(false, false, rows, d_in, d_out, T{1}, grad_y, d_out, args.weight.data<T>(), d_in,
            args.accumulate_x ? T{1} : T{0}, args.grad_x.data<T>(), d_in);
  }
  if (args.grad_weight.defined()) {
    gemm<T>(true, false, d_out, d_in, rows, T{1}, grad_y, d_out, args.x.data<T>(), d_in,
            args.accumulate_weight ? T{1} : T{0}, args.grad_weight.data<T>(), d_in);
  }
  if (args.grad_bias.defined()) sum_rows(grad_y, rows, d_out, args.accumulate_bias, args.grad_bias.data<T>());
}

}  // namespace

void linear_forward_cpu(const LinearForwardArgs& args) {
  dispatch_real(args.x.dtype(), "linear", [&](auto element) { forward<decltype(element)>(args); });
}

void linear_backward_cpu(const LinearBackwardArgs& args) {
  dispatch_real(args.x.dtype(), "linear", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
