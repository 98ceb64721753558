#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/partial_sums.h"
#include "ops/rms_norm/rms_norm_kernels.h"

// A block walks whole rows, its threads side by side along the channels: every access is to neighbours. A row stays in
// the first-level cache between the pass that sums and the pass that writes. X is what x and its gradient are stored
// as, Y what gate, y and their gradients are.

namespace headwater {
namespace {

constexpr int block = 128;

struct Sizes {
  int64_t d, group_size, n_groups;
  bool norm_before_gate;
};

/// What is normalised: x, or x * silu(gate) when the gate comes first.
template <class X, class Y>
__device__ float value_at(const X* x, const Y* gate, bool norm_before_gate, int64_t j) {
  const float value = to_float(x[j]);
  return gate == nullptr || norm_before_gate ? value : value * silu_of(to_float(gate[j]));
}

/// One block a row.
template <class X, class Y>
__global__ void forward(const X* x, const float* weight, const Y* gate, Y* y, float* inverse_rms, Sizes sizes,
                        float epsilon) {
  SharedMemory shared;
  const SharedArray<float> scratch = shared.array<float>(n_warps());
  const int64_t row = blockIdx.x;
  x += row * sizes.d;
  y += row * sizes.d;
  if (gate != nullptr) gate += row * sizes.d;
  for (int64_t group = 0; group < sizes.n_groups; ++group) {
    const int64_t first = group * sizes.group_size, last = first + sizes.group_size;
    float squares = 0.0f;
    for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) {
      const float v = value_at(x, gate, sizes.norm_before_gate, j);
      squares += v * v;
    }
    const float mean = block_sum(squares, scratch) / static_cast<float>(sizes.group_size);
    const float r = 1.0f / sqrtf(mean + epsilon);
    if (threadIdx.x == 0) inverse_rms[row * sizes.n_groups + group] = r;
    for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) {
      float result = value_at(x, gate, sizes.norm_before_gate, j) * r * weight[j];
      if (gate != nullptr && sizes.norm_before_gate) result *= silu_of(to_float(gate[j]));
      y[j] = from_float<Y>(result);
    }
  }
}

/// One block a stretch of rows. Shared: a sum for each channel (a channel is always the same thread's), and block_sum's
/// scratch. partials: (blocks, d).
template <class X, class Y>
__global__ void backward(const X* x, const float* weight, const Y* gate, const float* inverse_rms,
                         const Y* grad_y, X* grad_x, Y* grad_gate, float* partials, Sizes sizes, int64_t rows,
                         int64_t rows_per_block) {
  SharedMemory shared;
  const SharedArray<float> grad_weight = shared.array<float>(static_cast<int>(sizes.d));
  const SharedArray<float> scratch = shared.array<float>(n_warps());
  const bool gate_first = gate != nullptr && !sizes.norm_before_gate;
  const bool gate_last = gate != nullptr && sizes.norm_before_gate;
  for (int64_t group = 0; group < sizes.n_groups; ++group) {
    const int64_t first = group * sizes.group_size, last = first + sizes.group_size;
    for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) grad_weight[static_cast<int>(j)] = 0.0f;
  }
  const int64_t first_row = blockIdx.x * rows_per_block;
  const int64_t last_row = first_row + rows_per_block < rows ? first_row + rows_per_block : rows;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t offset = row * sizes.d;
    const Y* row_gate = gate != nullptr ? gate + offset : nullptr;
    for (int64_t group = 0; group < sizes.n_groups; ++group) {
      const int64_t first = group * sizes.group_size, last = first + sizes.group_size;
      const float r = inverse_rms[row * sizes.n_groups + group];
      float product = 0.0f;
      for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) {
        const float v = value_at(x + offset, row_gate, sizes.norm_before_gate, j);
        const float g = to_float(grad_y[offset + j]) * (gate_last ? silu_of(to_float(row_gate[j])) : 1.0f);
        product += g * weight[j] * v;
        grad_weight[static_cast<int>(j)] += g * v * r;
      }
      const float mean = block_sum(product, scratch) / static_cast<float>(sizes.group_size);
      for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) {
        const float v = value_at(x + offset, row_gate, sizes.norm_before_gate, j);
        const float gate_value = gate != nullptr ? to_float(row_gate[j]) : 0.0f;
        const float silu_gate = gate != nullptr ? silu_of(gate_value) : 1.0f;
        const float given = to_float(grad_y[offset + j]);
        const float g = gate_last ? given * silu_gate : given;
        const float grad_v = r * (g * weight[j] - v * r * r * mean);
        grad_x[offset + j] = from_float<X>(gate_first ? grad_v * silu_gate : grad_v);
        if (gate_first) {
          grad_gate[offset + j] = from_float<Y>(grad_v * to_float(x[offset + j]) * silu_slope(gate_value));
        } else if (gate_last) {
          grad_gate[offset + j] = from_float<Y>(given * v * r * weight[j] * silu_slope(gate_value));
        }
      }
    }
  }
  for (int64_t group = 0; group < sizes.n_groups; ++group) {
    const int64_t first = group * sizes.group_size, last = first + sizes.group_size;
    for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) {
      partials[blockIdx.x * sizes.d + j] = grad_weight[static_cast<int>(j)];
    }
  }
}

Sizes sizes_of(const Tensor& x, const Tensor& inverse_rms, bool norm_before_gate) {
  const int64_t d = x.dim(-1), n_groups = inverse_rms.dim(1);
  return {d, d / n_groups, n_groups, norm_before_gate};
}

}  // namespace

void rms_norm_forward_cuda(const RmsNormForwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape());
  dispatch_cuda(args.x.dtype(), "rms_norm", [&](auto x_element) {
    dispatch_cuda(args.y.dtype(), "rms_norm", [&](auto y_element) {
      using X = decltype(x_element);
      using Y = decltype(y_element);
      launch("rms_norm_forward", forward<X, Y>,
             {.grid = {rows}, .block = block, .shared_bytes = shared_bytes<float>(block / warp_size)},
             args.x.data<X>(), args.weight.data<float>(), args.gate.data<Y>(), args.y.data<Y>(),
             args.inverse_rms.data<float>(), sizes_of(args.x, args.inverse_rms, args.norm_before_gate),
             static_cast<float>(args.epsilon));
    });
  });
}

void rms_norm_backward_cuda(const RmsNormBackwardArgs& args) {
  const CudaRowBlocks blocks(rows_of(args.x.shape()));
  const int64_t d = args.x.dim(-1);
  const Tensor partials = Tensor::empty({blocks.n_blocks, d}, DType::f32, args.x.device());
  dispatch_cuda(args.x.dtype(), "rms_norm", [&](auto x_element) {
    dispatch_cuda(args.grad_y.dtype(), "rms_norm", [&](auto y_element) {
      using X = decltype(x_element);
      using Y = decltype(y_element);
      launch("rms_norm_backward", backward<X, Y>,
             {.grid = {blocks.n_blocks},
              .block = block,
              .shared_bytes = shared_bytes<float>(d) + shared_bytes<float>(block / warp_size)},
             args.x.data<X>(), args.weight.data<float>(), args.gate.data<Y>(), args.inverse_rms.data<float>(),
             args.grad_y.data<Y>(), args.grad_x.data<X>(), args.grad_gate.data<Y>(), partials.data<float>(),
             sizes_of(args.x, args.inverse_rms, args.norm_before_gate), blocks.rows, blocks.rows_per_block);
    });
  });
  sum_partials_cuda(partials, args.grad_weight, args.accumulate_weight);
}

}  // namespace headwater
