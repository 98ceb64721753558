#include <algorithm>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"
#include "ops/token_shift/token_shift_kernels.h"

// Bound by memory. A thread owns N channels side by side and some rows, one after another: of a row's two inputs the
// second is the first of the row before, which a cache still holds. A row is one step of one sequence.

namespace headwater {
namespace {

constexpr int block = 128;
constexpr int max_mixes = token_shift_max_mixes;

struct Sizes {
  int64_t n_rows, length, channels, rows_per_thread;
  int n_mixes;
};

/// One for each mix; null from n_mixes on, and where a gradient is 0.
template <class T>
struct Pointers {
  T* at[max_mixes];
};

template <class T>
Pointers<T> pointers_of(const TokenShiftTensors& tensors) {
  Pointers<T> pointers{};
  for (int i = 0; i < max_mixes; ++i) pointers.at[i] = tensors[i].data<T>();
  return pointers;
}

/// initial_state and resets may be null.
template <class T>
struct Inputs {
  const T* x;
  Pointers<float> mixes;
  const T* initial_state;
  const int32_t* resets;

  __device__ bool starts_document(int64_t row) const { return resets != nullptr && resets[row] != 0; }

  /// x one step before `row`, at N channels from c on.
  template <int N>
  __device__ void load_previous(const Sizes& sizes, int64_t row, int64_t c, float (&values)[N]) const {
    for (int j = 0; j < N; ++j) values[j] = 0.0f;
    if (starts_document(row)) return;
    if (row % sizes.length != 0) {
      load_floats(x + (row - 1) * sizes.channels + c, values);
    } else if (initial_state != nullptr) {
      load_floats(initial_state + row / sizes.length * sizes.channels + c, values);
    }
  }
};

template <class T, class Args>
Inputs<T> inputs_of(const Args& args) {
  return {args.x.template data<T>(), pointers_of<float>(args.mixes), args.initial_state.template data<T>(),
          args.resets.template data<int32_t>()};
}

/// Grid x: channels, N a thread; y: rows, rows_per_thread a block.
template <class T, int N>
__global__ void __launch_bounds__(block)
    shift_forward(Inputs<T> in, Pointers<T> y, T* final_state, Sizes sizes) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (c >= sizes.channels) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * sizes.rows_per_thread;
  const int64_t end =
      begin + sizes.rows_per_thread < sizes.n_rows ? begin + sizes.rows_per_thread : sizes.n_rows;
  float mixes[max_mixes][N] = {};
#pragma unroll
  for (int i = 0; i < max_mixes; ++i) {
    if (i < sizes.n_mixes) load_floats(in.mixes.at[i] + c, mixes[i]);
  }
  for (int64_t row = begin; row < end; ++row) {
    float x[N], previous[N];
    load_floats(in.x + row * sizes.channels + c, x);
    in.load_previous(sizes, row, c, previous);
#pragma unroll
    for (int i = 0; i < max_mixes; ++i) {
      if (i >= sizes.n_mixes) continue;
      float result[N];
      for (int j = 0; j < N; ++j) result[j] = mixes[i][j] * x[j] + (1.0f - mixes[i][j]) * previous[j];
      store_floats(y.at[i] + row * sizes.channels + c, result);
    }
    if (row % sizes.length == sizes.length - 1)
      store_floats(final_state + row / sizes.length * sizes.channels + c, x);
  }
}

template <class T>
struct Gradients {
  Pointers<T> y;
  const T* final_state;  // or null
  T* x;
  T* initial_state;  // or null
};

/// Threads as in the forward. Partials: f32 (n_mixes, blocks of rows, channels).
template <class T, int N>
__global__ void __launch_bounds__(block)
    shift_backward(Inputs<T> in, Gradients<T> gradients, float* partials, Sizes sizes) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (c >= sizes.channels) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * sizes.rows_per_thread;
  const int64_t end =
      begin + sizes.rows_per_thread < sizes.n_rows ? begin + sizes.rows_per_thread : sizes.n_rows;
  float mixes[max_mixes][N] = {}, sums[max_mixes][N] = {};
#pragma unroll
  for (int i = 0; i < max_mixes; ++i) {
    if (i < sizes.n_mixes) load_floats(in.mixes.at[i] + c, mixes[i]);
  }
  // target += what `row` gives to the step before it.
  const auto add_to_previous = [&](int64_t row, float(&target)[N]) {
#pragma unroll
    for (int i = 0; i < max_mixes; ++i) {
      if (gradients.y.at[i] == nullptr) continue;
      float g[N];
      load_floats(gradients.y.at[i] + row * sizes.channels + c, g);
      for (int j = 0; j < N; ++j) target[j] += (1.0f - mixes[i][j]) * g[j];
    }
  };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / sizes.length;
    const bool is_first = row % sizes.length == 0, is_last = row % sizes.length == sizes.length - 1;
    float x[N], previous[N], grad_x[N] = {};
    load_floats(in.x + row * sizes.channels + c, x);
    in.load_previous(sizes, row, c, previous);
    if (is_last && gradients.final_state != nullptr)
      load_floats(gradients.final_state + b * sizes.channels + c, grad_x);
#pragma unroll
    for (int i = 0; i < max_mixes; ++i) {
      if (gradients.y.at[i] == nullptr) continue;
      float g[N];
      load_floats(gradients.y.at[i] + row * sizes.channels + c, g);
      for (int j = 0; j < N; ++j) {
        grad_x[j] += mixes[i][j] * g[j];
        sums[i][j] += (x[j] - previous[j]) * g[j];
      }
    }
    if (!is_last && !in.starts_document(row + 1)) add_to_previous(row + 1, grad_x);
    store_floats(gradients.x + row * sizes.channels + c, grad_x);
    if (is_first && gradients.initial_state != nullptr) {
      float grad_initial[N] = {};
      if (!in.starts_document(row)) add_to_previous(row, grad_initial);
      store_floats(gradients.initial_state + b * sizes.channels + c, grad_initial);
    }
  }
#pragma unroll
  for (int i = 0; i < max_mixes; ++i) {
    if (i < sizes.n_mixes)
      store_floats(partials + (i * static_cast<int64_t>(gridDim.y) + blockIdx.y) * sizes.channels + c,
                   sums[i]);
  }
}

/// Rows are shared out to at most 256 blocks, as in every sum over rows.
template <class Args>
Sizes sizes_of(const Args& args) {
  const int64_t n_rows = args.x.dim(0) * args.x.dim(1);
  return {n_rows, args.x.dim(1), args.x.dim(2), CudaRowBlocks(n_rows).rows_per_block, args.n_mixes};
}

LaunchShape shape_for(const Sizes& sizes, int n_channels) {
  return {.grid = {blocks_for(sizes.channels, static_cast<int64_t>(block) * n_channels),
                   blocks_for(sizes.n_rows, sizes.rows_per_thread)},
          .block = block};
}

template <class Args, class... More>
bool can_pack_all(const Args& args, const TokenShiftTensors& y, const More&... more) {
  bool possible =
      can_pack(args.x.dim(2), {args.x.raw_data(), args.initial_state.raw_data(), more.raw_data()...});
  for (int i = 0; i < args.n_mixes; ++i)
    possible = possible && can_pack(args.x.dim(2), {args.mixes[i].raw_data(), y[i].raw_data()});
  return possible;
}

}  // namespace

void token_shift_forward_cuda(const TokenShiftForwardArgs& args) {
  const Sizes sizes = sizes_of(args);
  dispatch_cuda(args.x.dtype(), "token_shift", [&](auto element) {
    using T = decltype(element);
    dispatch_packing(can_pack_all(args, args.y, args.final_state), [&](auto packing) {
      constexpr int N = packing;
      launch("token_shift_forward", shift_forward<T, N>, shape_for(sizes, N), inputs_of<T>(args),
             pointers_of<T>(args.y), args.final_state.data<T>(), sizes);
    });
  });
}

void token_shift_backward_cuda(const TokenShiftBackwardArgs& args) {
  const Sizes sizes = sizes_of(args);
  const int64_t n_blocks = blocks_for(sizes.n_rows, sizes.rows_per_thread);
  const Tensor partials =
      Tensor::empty({args.n_mixes, n_blocks, sizes.channels}, DType::f32, args.x.device());
  dispatch_cuda(args.x.dtype(), "token_shift", [&](auto element) {
    using T = decltype(element);
    const Gradients<T> gradients{pointers_of<T>(args.grad_y), args.grad_final_state.data<T>(),
                                 args.grad_x.data<T>(), args.grad_initial_state.data<T>()};
    const bool packed =
        can_pack_all(args, args.grad_y, args.grad_x, args.grad_final_state, args.grad_initial_state);
    dispatch_packing(packed, [&](auto packing) {
      constexpr int N = packing;
      launch("token_shift_backward", shift_backward<T, N>, shape_for(sizes, N), inputs_of<T>(args), gradients,
             partials.data<float>(), sizes);
    });
  });
  for (int i = 0; i < args.n_mixes; ++i) {
    sum_partials_cuda(partials.narrow(i, i + 1).reshape({n_blocks, sizes.channels}), args.grad_mixes[i],
                      args.accumulate[i]);
  }
}

}  // namespace headwater
