#include <algorithm>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/adamw/adamw_kernels.h"

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;

/// N elements; bf16_copy may be null.
template <int N>
__device__ void update_elements(float* value, const float* gradient, float* m, float* v, BFloat16* bf16_copy,
                                const AdamWNumbers<float>& o) {
  const Packed<float, N> gradients = load_packed<N>(gradient);
  Packed<float, N> values = load_packed<N>(value), first = load_packed<N>(m), second = load_packed<N>(v);
  Packed<BFloat16, N> rounded;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float g = o.gradient_scale * gradients.values[k];
    first.values[k] = o.beta1 * first.values[k] + (1.0f - o.beta1) * g;
    second.values[k] = o.beta2 * second.values[k] + (1.0f - o.beta2) * g * g;
    values.values[k] = o.keep * values.values[k] - o.learning_rate * (first.values[k] * o.correction1) /
                                                       (sqrtf(second.values[k] * o.correction2) + o.epsilon);
    rounded.values[k] = to_bfloat16(values.values[k]);
  }
  store_packed<N>(m, first);
  store_packed<N>(v, second);
  store_packed<N>(value, values);
  if (bf16_copy != nullptr) store_packed<N>(bf16_copy, rounded);
}

/// N neighbouring elements a thread, in a grid-stride loop, then the last n % N one by one. One kernel with and without
/// a plan, so that equal numbers give equal bits.
template <int N>
__global__ void update(float* value, const float* gradient, float* m, float* v, BFloat16* bf16_copy,
                       int64_t n, AdamWConstants constants, AdamWStep step, const double* plan) {
  if (plan != nullptr) {
    if (plan[plan_apply] == 0.0) return;
    step = planned_step(plan);
  }
  const AdamWNumbers<float> numbers = adamw_numbers<float>(constants, step);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto copy_at = [&](int64_t i) { return bf16_copy != nullptr ? bf16_copy + i : nullptr; };
  const int64_t n_packed = n / N * N;
  for (int64_t i = thread * N; i < n_packed; i += stride * N) {
    update_elements<N>(value + i, gradient + i, m + i, v + i, copy_at(i), numbers);
  }
  const int64_t last = n_packed + thread;
  if (last < n) update_elements<1>(value + last, gradient + last, m + last, v + last, copy_at(last), numbers);
}

/// One thread does it all.
template <class T>
__global__ void make_plan(const double* gradient_squares, const T* loss, const double* schedule,
                          double* plan) {
  if (threadIdx.x == 0) write_plan(*gradient_squares, static_cast<double>(*loss), schedule, plan);
}

/// The sum over the block's threads, in every thread. `scratch` holds a number for each warp.
__device__ double sum_of_threads(double value, SharedArray<double> scratch) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  double sum = 0.0;
  for (int warp = 0; warp < n_warps(); ++warp) sum += scratch[warp];
  return sum;
}

constexpr int group = 4;  // elements that a thread squares at a time
constexpr int64_t max_sum_blocks = 1024;

/// How the groups of n elements are shared out to blocks: by n alone.
struct SumBlocks {
  explicit SumBlocks(int64_t n)
      : groups_per_block(std::max<int64_t>(block, blocks_for(blocks_for(n, group), max_sum_blocks))),
        n_blocks(blocks_for(blocks_for(n, group), groups_per_block)) {}
  int64_t groups_per_block, n_blocks;
};

/// One block a stretch of groups, which its threads take in turn, with a running sum for each place in a group.
/// `packed` says that a group is one access; the order is the same without. Shared: a number for each warp.
template <bool packed>
__global__ void sum_squares(const float* values, int64_t n, int64_t groups_per_block, double* partials) {
  SharedMemory shared;
  const SharedArray<double> scratch = shared.array<double>(n_warps());
  const int64_t first = blockIdx.x * groups_per_block;
  double sums[group] = {};
  for (int64_t within = threadIdx.x; within < groups_per_block; within += blockDim.x) {
    const int64_t i = (first + within) * group;
    if (i >= n) break;
    Packed<float, group> loaded;
    if (packed && i + group <= n) {
      loaded = load_packed<group>(values + i);
    } else {
#pragma unroll
      for (int k = 0; k < group; ++k) loaded.values[k] = i + k < n ? values[i + k] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < group; ++k) {
      sums[k] += static_cast<double>(loaded.values[k]) * static_cast<double>(loaded.values[k]);
    }
  }
  const double sum = sum_of_threads((sums[0] + sums[1]) + (sums[2] + sums[3]), scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

/// One block. Shared: a number for each warp.
__global__ void sum_doubles(const double* partials, int64_t n, double* sum) {
  SharedMemory shared;
  const SharedArray<double> scratch = shared.array<double>(n_warps());
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) own += partials[i];
  const double all = sum_of_threads(own, scratch);
  if (threadIdx.x == 0) *sum = all;
}

template <int N, class T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (N * sizeof(T)) == 0;
}

void check_dtype(const char* op, const Tensor& tensor) {
  require(tensor.dtype() == DType::f32, "{}: dtype {} is not supported on a GPU; use f32", op,
          name_of(tensor.dtype()));
}

}  // namespace

void adamw_cuda(const AdamWArgs& args) {
  check_dtype("adamw_update", args.value);
  constexpr int N = 4;
  float* value = args.value.data<float>();
  const float* gradient = args.gradient.data<float>();
  float* m = args.m.data<float>();
  float* v = args.v.data<float>();
  BFloat16* bf16_copy = args.bf16_copy.data<BFloat16>();
  const bool packed = is_aligned<N>(value) && is_aligned<N>(gradient) && is_aligned<N>(m) &&
                      is_aligned<N>(v) && is_aligned<N>(bf16_copy);
  const int64_t n = args.value.numel();
  launch("adamw", packed ? update<N> : update<1>,
         {.grid = {std::min(blocks_for(n, block * (packed ? N : 1)), max_blocks)}, .block = block}, value,
         gradient, m, v, bf16_copy, n, args.constants, args.step, args.plan.data<double>());
}

void plan_update_cuda(const PlanUpdateArgs& args) {
  dispatch_real(args.loss.dtype(), "plan_update", [&](auto element) {
    using T = decltype(element);
    launch("plan_update", make_plan<T>, {.grid = {1}, .block = warp_size},
           args.gradient_squares.data<double>(), args.loss.data<T>(), args.schedule.data<double>(),
           args.plan.data<double>());
  });
}

void sum_of_squares_cuda(const SumOfSquaresArgs& args) {
  check_dtype("sum_of_squares", args.values);
  const float* values = args.values.data<float>();
  const int64_t n = args.values.numel();
  const SumBlocks blocks(n);
  const Tensor partials = Tensor::empty({blocks.n_blocks}, DType::f64, args.values.device());
  launch("sum_of_squares", is_aligned<group>(values) ? sum_squares<true> : sum_squares<false>,
         {.grid = {blocks.n_blocks}, .block = block, .shared_bytes = shared_bytes<double>(block / warp_size)},
         values, n, blocks.groups_per_block, partials.data<double>());
  launch("sum_of_squares_total", sum_doubles,
         {.grid = {1}, .block = block, .shared_bytes = shared_bytes<double>(block / warp_size)},
         partials.data<double>(), blocks.n_blocks, args.sum.data<double>());
}

}  // namespace headwater
