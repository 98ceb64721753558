#include <algorithm>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/layer_norm/layer_norm_kernels.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"

// A warp works on a row alone, so that nothing waits for a barrier; its lanes walk the channels N side by side. A row is
// in the first-level cache after the first pass over it.

namespace headwater {
namespace {

constexpr int forward_warps = 4;
constexpr int most_backward_warps = 8;

/// One warp a row.
template <class T, int N>
__global__ void forward(const T* x, const float* weight, const float* bias, T* y, float* means,
                        float* inverse_stds, int64_t rows, int64_t d, float epsilon) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (row >= rows) return;
  x += row * d;
  y += row * d;
  const int64_t first = lane_index() * N, step = warp_size * N;
  float sum = 0.0f;
  for (int64_t j = first; j < d; j += step) {
    float v[N];
    load_floats(x + j, v);
    for (int i = 0; i < N; ++i) sum += v[i];
  }
  const float mean = warp_sum(sum) / static_cast<float>(d);
  float squares = 0.0f;
  for (int64_t j = first; j < d; j += step) {
    float v[N];
    load_floats(x + j, v);
    for (int i = 0; i < N; ++i) squares += (v[i] - mean) * (v[i] - mean);
  }
  const float r = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(d) + epsilon);
  for (int64_t j = first; j < d; j += step) {
    float v[N], w[N], b[N];
    load_floats(x + j, v);
    load_floats(weight + j, w);
    load_floats(bias + j, b);
    for (int i = 0; i < N; ++i) v[i] = (v[i] - mean) * r * w[i] + b[i];
    store_floats(y + j, v);
  }
  if (lane_index() == 0) {
    means[row] = mean;
    inverse_stds[row] = r;
  }
}

/// One block a stretch of rows, every n_warps-th of them a warp's. Shared: each warp's sums of the gradients of weight
/// and bias; a channel of them is always the same lane's until the barrier. Partials: (blocks, d).
template <class T, int N>
__global__ void backward(const T* x, const float* weight, const float* means, const float* inverse_stds,
                         const T* grad_y, T* grad_x, float* weight_partials, float* bias_partials,
                         int64_t rows, int64_t rows_per_block, int64_t d) {
  SharedMemory shared;
  const int width = static_cast<int>(d);
  const SharedArray<float> all_weight_sums = shared.array<float>(n_warps() * width);
  const SharedArray<float> all_bias_sums = shared.array<float>(n_warps() * width);
  const SharedArray<float> weight_sums = all_weight_sums.from(warp_index() * width);
  const SharedArray<float> bias_sums = all_bias_sums.from(warp_index() * width);
  const int first = lane_index() * N, step = warp_size * N;
  for (int j = first; j < width; j += step) {
    weight_sums.store(j, Packed<float, N>{});
    bias_sums.store(j, Packed<float, N>{});
  }
  const int64_t first_row = blockIdx.x * rows_per_block;
  const int64_t last_row = first_row + rows_per_block < rows ? first_row + rows_per_block : rows;
  for (int64_t row = first_row + warp_index(); row < last_row; row += n_warps()) {
    const int64_t offset = row * d;
    const float mean = means[row], r = inverse_stds[row];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int j = first; j < width; j += step) {
      float n[N], w[N], given[N];
      load_floats(x + offset + j, n);
      load_floats(grad_y + offset + j, given);
      load_floats(weight + j, w);
      add_to_shared(bias_sums, j, given);
      for (int i = 0; i < N; ++i) {
        n[i] = (n[i] - mean) * r;
        sum_g += given[i] * w[i];
        sum_gn += given[i] * w[i] * n[i];
        given[i] *= n[i];
      }
      add_to_shared(weight_sums, j, given);
    }
    const float mean_g = warp_sum(sum_g) / static_cast<float>(d);
    const float mean_gn = warp_sum(sum_gn) / static_cast<float>(d);
    for (int j = first; j < width; j += step) {
      float v[N], w[N], given[N];
      load_floats(x + offset + j, v);
      load_floats(grad_y + offset + j, given);
      load_floats(weight + j, w);
      for (int i = 0; i < N; ++i) v[i] = r * (given[i] * w[i] - mean_g - (v[i] - mean) * r * mean_gn);
      store_floats(grad_x + offset + j, v);
    }
  }
  sync_block();
  for (int j = static_cast<int>(threadIdx.x); j < width; j += static_cast<int>(blockDim.x)) {
    float weight_sum = 0.0f, bias_sum = 0.0f;
    for (int warp = 0; warp < n_warps(); ++warp) {
      weight_sum += all_weight_sums[warp * width + j];
      bias_sum += all_bias_sums[warp * width + j];
    }
    weight_partials[blockIdx.x * d + j] = weight_sum;
    bias_partials[blockIdx.x * d + j] = bias_sum;
  }
}

}  // namespace

void layer_norm_forward_cuda(const LayerNormForwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape()), d = args.x.dim(-1);
  dispatch_cuda(args.x.dtype(), "layer_norm", [&](auto element) {
    using T = decltype(element);
    const bool packed =
        can_pack(d, {args.x.raw_data(), args.weight.raw_data(), args.bias.raw_data(), args.y.raw_data()});
    dispatch_packing(packed, [&](auto n) {
      launch("layer_norm_forward", forward<T, n>,
             {.grid = {blocks_for(rows, forward_warps)}, .block = forward_warps * warp_size},
             args.x.data<T>(), args.weight.data<float>(), args.bias.data<float>(), args.y.data<T>(),
             args.mean.data<float>(), args.inverse_std.data<float>(), rows, d,
             static_cast<float>(args.epsilon));
    });
  });
}

void layer_norm_backward_cuda(const LayerNormBackwardArgs& args) {
  const CudaRowBlocks blocks(rows_of(args.x.shape()));
  const int64_t d = args.x.dim(-1);
  const int64_t bytes_per_warp = 2 * shared_bytes<float>(d);
  const int n_warps = warps_that_fit("layer_norm", most_backward_warps, bytes_per_warp, d);
  const Tensor weight_partials = Tensor::empty({blocks.n_blocks, d}, DType::f32, args.x.device());
  const Tensor bias_partials = empty_like(weight_partials);
  dispatch_cuda(args.x.dtype(), "layer_norm", [&](auto element) {
    using T = decltype(element);
    const bool packed = can_pack(
        d, {args.x.raw_data(), args.weight.raw_data(), args.grad_y.raw_data(), args.grad_x.raw_data()});
    dispatch_packing(packed, [&](auto n) {
      launch(
          "layer_norm_backward", backward<T, n>,
          {.grid = {blocks.n_blocks}, .block = n_warps * warp_size, .shared_bytes = n_warps * bytes_per_warp},
          args.x.data<T>(), args.weight.data<float>(), args.mean.data<float>(),
          args.inverse_std.data<float>(), args.grad_y.data<T>(), args.grad_x.data<T>(),
          weight_partials.data<float>(), bias_partials.data<float>(), blocks.rows, blocks.rows_per_block, d);
    });
  });
  sum_partials_cuda(weight_partials, args.grad_weight, args.accumulate_weight);
  sum_partials_cuda(bias_partials, args.grad_bias, args.accumulate_bias);
}

}  // namespace headwater
