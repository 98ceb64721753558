#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"
#include "ops/rms_norm/rms_norm_kernels.h"

// A warp works on a row alone, so that nothing waits for a barrier; its lanes walk the channels of a group N side by side.
// A row is in the first-level cache after the first pass over it. X is what x and its gradient are stored as, Y what gate,
// y and their gradients are.

namespace headwater {
namespace {

constexpr int forward_warps = 4;
constexpr int most_backward_warps = 8;

struct Sizes {
  int64_t rows, d, group_size, n_groups;
  bool norm_before_gate;
};

/// What is normalised: x, or x * silu(gate) when the gate comes first.
template <int N, class X, class Y>
__device__ void load_values(const X* x, const Y* gate, bool norm_before_gate, float (&v)[N]) {
  load_floats(x, v);
  if (gate == nullptr || norm_before_gate) return;
  float gates[N];
  load_floats(gate, gates);
  for (int i = 0; i < N; ++i) v[i] *= silu_of(gates[i]);
}

/// One warp a row.
template <class X, class Y, int N>
__global__ void forward(const X* x, const float* weight, const Y* gate, Y* y, float* inverse_rms, Sizes sizes,
                        float epsilon) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (row >= sizes.rows) return;
  x += row * sizes.d;
  y += row * sizes.d;
  if (gate != nullptr) gate += row * sizes.d;
  const auto gate_at = [&](int64_t j) { return gate != nullptr ? gate + j : nullptr; };
  const int64_t step = warp_size * N;
  for (int64_t group = 0; group < sizes.n_groups; ++group) {
    const int64_t first = group * sizes.group_size + lane_index() * N, last = (group + 1) * sizes.group_size;
    float squares = 0.0f;
    for (int64_t j = first; j < last; j += step) {
      float v[N];
      load_values(x + j, gate_at(j), sizes.norm_before_gate, v);
      for (int i = 0; i < N; ++i) squares += v[i] * v[i];
    }
    const float r = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(sizes.group_size) + epsilon);
    if (lane_index() == 0) inverse_rms[row * sizes.n_groups + group] = r;
    for (int64_t j = first; j < last; j += step) {
      float v[N], w[N];
      load_values(x + j, gate_at(j), sizes.norm_before_gate, v);
      load_floats(weight + j, w);
      for (int i = 0; i < N; ++i) v[i] *= r * w[i];
      if (gate != nullptr && sizes.norm_before_gate) {
        float gates[N];
        load_floats(gate + j, gates);
        for (int i = 0; i < N; ++i) v[i] *= silu_of(gates[i]);
      }
      store_floats(y + j, v);
    }
  }
}

template <class X, class Y>
struct BackwardPointers {
  const X* x;
  const float* weight;
  const Y* gate;  // nullptr: none
  const float* inverse_rms;
  const Y* grad_y;
  X* grad_x;
  Y* grad_gate;
};

/// The gradients of channels [j, j + N) of a row, once the mean of g weight v over their group is known.
template <int N, class X, class Y>
__device__ void write_gradients(const BackwardPointers<X, Y>& at, int64_t offset, int64_t j,
                                bool norm_before_gate, float r, float mean) {
  float v[N], w[N], given[N], gates[N];
  load_values(at.x + offset + j, at.gate != nullptr ? at.gate + offset + j : nullptr, norm_before_gate, v);
  load_floats(at.weight + j, w);
  load_floats(at.grad_y + offset + j, given);
  if (at.gate == nullptr) {
    for (int i = 0; i < N; ++i) v[i] = r * (given[i] * w[i] - v[i] * r * r * mean);
    store_floats(at.grad_x + offset + j, v);
    return;
  }
  load_floats(at.gate + offset + j, gates);
  float to_x[N], to_gate[N], x[N];
  load_floats(at.x + offset + j, x);
  for (int i = 0; i < N; ++i) {
    const float silu_gate = silu_of(gates[i]);
    const float g = norm_before_gate ? given[i] * silu_gate : given[i];
    const float grad_v = r * (g * w[i] - v[i] * r * r * mean);
    to_x[i] = norm_before_gate ? grad_v : grad_v * silu_gate;
    to_gate[i] = (norm_before_gate ? given[i] * v[i] * r * w[i] : grad_v * x[i]) * silu_slope(gates[i]);
  }
  store_floats(at.grad_x + offset + j, to_x);
  store_floats(at.grad_gate + offset + j, to_gate);
}

/// One block a stretch of rows, every n_warps-th of them a warp's. Shared: each warp's sums of the gradient of weight; a
/// channel of them is always the same lane's until the barrier. partials: (blocks, d).
template <class X, class Y, int N>
__global__ void backward(BackwardPointers<X, Y> at, float* partials, Sizes sizes, int64_t rows_per_block) {
  SharedMemory shared;
  const int width = static_cast<int>(sizes.d);
  const SharedArray<float> all_sums = shared.array<float>(n_warps() * width);
  const SharedArray<float> sums = all_sums.from(warp_index() * width);
  const bool gate_last = at.gate != nullptr && sizes.norm_before_gate;
  const int group_size = static_cast<int>(sizes.group_size), step = warp_size * N;
  for (int begin = 0; begin < width; begin += group_size) {
    for (int j = begin + lane_index() * N; j < begin + group_size; j += step)
      sums.store(j, Packed<float, N>{});
  }
  const int64_t first_row = blockIdx.x * rows_per_block;
  const int64_t last_row = first_row + rows_per_block < sizes.rows ? first_row + rows_per_block : sizes.rows;
  for (int64_t row = first_row + warp_index(); row < last_row; row += n_warps()) {
    const int64_t offset = row * sizes.d;
    for (int begin = 0; begin < width; begin += group_size) {
      const float r = at.inverse_rms[row * sizes.n_groups + begin / group_size];
      float product = 0.0f;
      for (int j = begin + lane_index() * N; j < begin + group_size; j += step) {
        float v[N], w[N], g[N];
        load_values(at.x + offset + j, at.gate != nullptr ? at.gate + offset + j : nullptr,
                    sizes.norm_before_gate, v);
        load_floats(at.weight + j, w);
        load_floats(at.grad_y + offset + j, g);
        if (gate_last) {
          float gates[N];
          load_floats(at.gate + offset + j, gates);
          for (int i = 0; i < N; ++i) g[i] *= silu_of(gates[i]);
        }
        for (int i = 0; i < N; ++i) {
          product += g[i] * w[i] * v[i];
          g[i] *= v[i] * r;
        }
        add_to_shared(sums, j, g);
      }
      const float mean = warp_sum(product) / static_cast<float>(sizes.group_size);
      for (int j = begin + lane_index() * N; j < begin + group_size; j += step) {
        write_gradients<N>(at, offset, j, sizes.norm_before_gate, r, mean);
      }
    }
  }
  sync_block();
  for (int j = static_cast<int>(threadIdx.x); j < width; j += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int warp = 0; warp < n_warps(); ++warp) sum += all_sums[warp * width + j];
    partials[blockIdx.x * sizes.d + j] = sum;
  }
}

Sizes sizes_of(const Tensor& x, const Tensor& inverse_rms, bool norm_before_gate) {
  const int64_t d = x.dim(-1), n_groups = inverse_rms.dim(1);
  return {rows_of(x.shape()), d, d / n_groups, n_groups, norm_before_gate};
}

}  // namespace

void rms_norm_forward_cuda(const RmsNormForwardArgs& args) {
  const Sizes sizes = sizes_of(args.x, args.inverse_rms, args.norm_before_gate);
  dispatch_cuda(args.x.dtype(), "rms_norm", [&](auto x_element) {
    dispatch_cuda(args.y.dtype(), "rms_norm", [&](auto y_element) {
      using X = decltype(x_element);
      using Y = decltype(y_element);
      const bool packed = can_pack(sizes.group_size, {args.x.raw_data(), args.weight.raw_data(),
                                                      args.gate.raw_data(), args.y.raw_data()});
      dispatch_packing(packed, [&](auto n) {
        launch("rms_norm_forward", forward<X, Y, n>,
               {.grid = {blocks_for(sizes.rows, forward_warps)}, .block = forward_warps * warp_size},
               args.x.data<X>(), args.weight.data<float>(), args.gate.data<Y>(), args.y.data<Y>(),
               args.inverse_rms.data<float>(), sizes, static_cast<float>(args.epsilon));
      });
    });
  });
}

void rms_norm_backward_cuda(const RmsNormBackwardArgs& args) {
  const Sizes sizes = sizes_of(args.x, args.inverse_rms, args.norm_before_gate);
  const CudaRowBlocks blocks(sizes.rows);
  const int64_t bytes_per_warp = shared_bytes<float>(sizes.d);
  const int n_warps = warps_that_fit("rms_norm", most_backward_warps, bytes_per_warp, sizes.d);
  const Tensor partials = Tensor::empty({blocks.n_blocks, sizes.d}, DType::f32, args.x.device());
  dispatch_cuda(args.x.dtype(), "rms_norm", [&](auto x_element) {
    dispatch_cuda(args.grad_y.dtype(), "rms_norm", [&](auto y_element) {
      using X = decltype(x_element);
      using Y = decltype(y_element);
      const BackwardPointers<X, Y> at{args.x.data<X>(),        args.weight.data<float>(),
                                      args.gate.data<Y>(),     args.inverse_rms.data<float>(),
                                      args.grad_y.data<Y>(),   args.grad_x.data<X>(),
                                      args.grad_gate.data<Y>()};
      const bool packed =
          can_pack(sizes.group_size, {at.x, at.weight, at.gate, at.grad_y, at.grad_x, at.grad_gate});
      dispatch_packing(packed, [&](auto n) {
        launch("rms_norm_backward", backward<X, Y, n>,
               {.grid = {blocks.n_blocks},
                .block = n_warps * warp_size,
                .shared_bytes = n_warps * bytes_per_warp},
               at, partials.data<float>(), sizes, blocks.rows_per_block);
      });
    });
  });
  sum_partials_cuda(partials, args.grad_weight, args.accumulate_weight);
}

}  // namespace headwater
