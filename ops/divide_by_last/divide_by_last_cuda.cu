#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/divide_by_last/divide_by_last_kernels.h"

// A warp works on a row alone, its lanes on neighbouring entries. Rows of d + 1 begin at odd addresses, so entries are
// read one by one.

namespace headwater {
namespace {

constexpr int warps_per_block = 8;

/// One warp a row.
template <class T>
__global__ void forward(const T* x, T* y, int64_t rows, int64_t d, float epsilon) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (row >= rows) return;
  x += row * (d + 1);
  y += row * d;
  const float r = 1.0f / (to_float(x[d]) + epsilon);
  for (int64_t j = lane_index(); j < d; j += warp_size) y[j] = from_float<T>(to_float(x[j]) * r);
}

/// One warp a row. The last entry's gradient is summed from unrounded numbers.
template <class T>
__global__ void backward(const T* x, const T* grad_y, T* grad_x, int64_t rows, int64_t d, float epsilon) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (row >= rows) return;
  x += row * (d + 1);
  grad_y += row * d;
  grad_x += row * (d + 1);
  const float r = 1.0f / (to_float(x[d]) + epsilon);
  float sum = 0.0f;
  for (int64_t j = lane_index(); j < d; j += warp_size) {
    const float gradient = to_float(grad_y[j]) * r;
    grad_x[j] = from_float<T>(gradient);
    sum += gradient * to_float(x[j]);
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) grad_x[d] = from_float<T>(-r * sum);
}

LaunchShape shape_for(int64_t rows) {
  return {.grid = {blocks_for(rows, warps_per_block)}, .block = warps_per_block * warp_size};
}

}  // namespace

void divide_by_last_forward_cuda(const DivideByLastForwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape()), d = args.y.dim(-1);
  dispatch_cuda(args.x.dtype(), "divide_by_last", [&](auto element) {
    using T = decltype(element);
    launch("divide_by_last_forward", forward<T>, shape_for(rows), args.x.data<T>(), args.y.data<T>(), rows, d,
           static_cast<float>(args.epsilon));
  });
}

void divide_by_last_backward_cuda(const DivideByLastBackwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape()), d = args.grad_y.dim(-1);
  dispatch_cuda(args.x.dtype(), "divide_by_last", [&](auto element) {
    using T = decltype(element);
    launch("divide_by_last_backward", backward<T>, shape_for(rows), args.x.data<T>(), args.grad_y.data<T>(),
           args.grad_x.data<T>(), rows, d, static_cast<float>(args.epsilon));
  });
}

}  // namespace headwater
