#include <algorithm>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/partial_sums.h"
#include "ops/step_size/step_size_kernels.h"

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;

struct Limits {
  bool softplus;
  float lower, upper;
};

/// dt before its clamp.
__device__ float open_step(float p, const Limits& limits) {
  return limits.softplus ? softplus_of(p) : p;
}

/// Compared as on the CPU, so that a NaN stays one.
__device__ float clamped(float open, const Limits& limits) {
  return open < limits.lower ? limits.lower : (open > limits.upper ? limits.upper : open);
}

/// One thread an element of x, in a grid-stride loop.
template <class T>
__global__ void forward(const T* x, const float* A, const float* dt_bias, float* dt, float* log_decay,
                        int64_t n, int64_t n_heads, Limits limits) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const int64_t head = i % n_heads;
    const float bias = dt_bias != nullptr ? dt_bias[head] : 0.0f;
    const float step = clamped(open_step(to_float(x[i]) + bias, limits), limits);
    dt[i] = step;
    log_decay[i] = step * A[head];
  }
}

template <class T>
struct BackwardPointers {
  const T* x;
  const float *A, *dt_bias, *grad_dt, *grad_log_decay;  // all but A may be null
  T* grad_x;
};

/// One block a stretch of rows. Its threads form groups of `heads_together`, side by side along the heads; the groups
/// take the rows in turn, and a thread keeps the sums of its head in registers. Shared: the sums of every thread, which
/// the first group adds in the order of the groups. partials_A, partials_bias: (blocks, n_heads).
template <class T>
__global__ void backward(BackwardPointers<T> in, float* partials_A, float* partials_bias, int64_t rows,
                         int64_t rows_per_block, int64_t n_heads, int heads_together, Limits limits) {
  SharedMemory shared;
  const SharedArray<float> sums_A = shared.array<float>(block), sums_bias = shared.array<float>(block);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / heads_together, n_groups = block / heads_together;
  const int64_t first_row = blockIdx.x * rows_per_block;
  const int64_t last_row = first_row + rows_per_block < rows ? first_row + rows_per_block : rows;
  for (int64_t first_head = 0; first_head < n_heads; first_head += heads_together) {
    const int64_t head = first_head + thread % heads_together;
    float sum_A = 0.0f, sum_bias = 0.0f;
    if (head < n_heads) {
      const float rate = in.A[head], bias = in.dt_bias != nullptr ? in.dt_bias[head] : 0.0f;
      for (int64_t row = first_row + group; row < last_row; row += n_groups) {
        const int64_t i = row * n_heads + head;
        const float p = to_float(in.x[i]) + bias;
        const float open = open_step(p, limits);
        const bool outside = open < limits.lower || open > limits.upper;
        const float slope = outside ? 0.0f : (limits.softplus ? sigmoid_of(p) : 1.0f);
        const float to_dt = in.grad_dt != nullptr ? in.grad_dt[i] : 0.0f;
        const float to_log_decay = in.grad_log_decay != nullptr ? in.grad_log_decay[i] : 0.0f;
        const float grad_x = (to_dt + rate * to_log_decay) * slope;
        in.grad_x[i] = from_float<T>(grad_x);
        sum_A += clamped(open, limits) * to_log_decay;
        sum_bias += grad_x;
      }
    }
    sums_A[thread] = sum_A;
    sums_bias[thread] = sum_bias;
    sync_block();
    if (group == 0 && head < n_heads) {
      for (int other = 1; other < n_groups; ++other) {
        sum_A += sums_A[other * heads_together + thread];
        sum_bias += sums_bias[other * heads_together + thread];
      }
      partials_A[blockIdx.x * n_heads + head] = sum_A;
      partials_bias[blockIdx.x * n_heads + head] = sum_bias;
    }
    sync_block();
  }
}

Limits limits_of(const StepSizeForwardArgs& args) {
  return {args.softplus, static_cast<float>(args.lower), static_cast<float>(args.upper)};
}

}  // namespace

void step_size_forward_cuda(const StepSizeForwardArgs& args) {
  dispatch_cuda(args.x.dtype(), "step_size", [&](auto element) {
    using T = decltype(element);
    const int64_t n = args.x.numel();
    launch("step_size_forward", forward<T>,
           {.grid = {std::min(blocks_for(n, block), max_blocks)}, .block = block}, args.x.data<T>(),
           args.A.data<float>(), args.dt_bias.data<float>(), args.dt.data<float>(),
           args.log_decay.data<float>(), n, args.A.numel(), limits_of(args));
  });
}

void step_size_backward_cuda(const StepSizeBackwardArgs& args) {
  const StepSizeForwardArgs& in = args.forward;
  const int64_t n_heads = in.A.numel();
  const CudaRowBlocks blocks(rows_of(in.x.shape()));
  const Tensor partials_A = Tensor::empty({blocks.n_blocks, n_heads}, DType::f32, in.x.device());
  const Tensor partials_bias = empty_like(partials_A);
  int heads_together = warp_size;  // the power of two that holds them all, if a block does
  while (heads_together < n_heads && heads_together < block) heads_together *= 2;
  dispatch_cuda(in.x.dtype(), "step_size", [&](auto element) {
    using T = decltype(element);
    const BackwardPointers<T> pointers{in.x.data<T>(),
                                       in.A.data<float>(),
                                       in.dt_bias.data<float>(),
                                       args.grad_dt.data<float>(),
                                       args.grad_log_decay.data<float>(),
                                       args.grad_x.data<T>()};
    launch("step_size_backward", backward<T>,
           {.grid = {blocks.n_blocks}, .block = block, .shared_bytes = 2 * shared_bytes<float>(block)},
           pointers, partials_A.data<float>(), partials_bias.data<float>(), blocks.rows,
           blocks.rows_per_block, n_heads, heads_together, limits_of(in));
  });
  sum_partials_cuda(partials_A, args.grad_A, false);
  sum_partials_cuda(partials_bias, args.grad_dt_bias, false);
}

}  // namespace headwater
