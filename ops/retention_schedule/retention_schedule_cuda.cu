#include <algorithm>
#include <cmath>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "core/error.h"
#include "ops/retention_schedule/retention_schedule_kernels.h"

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;
constexpr double two_pi = 6.283185307179586;

/// One block, of one warp, a sequence: 32 steps at a time, a running maximum finds the last reset at or before each. `start`
/// is the step at which the position was 0, negative where that lies before this stretch.
__global__ void find_positions(const int64_t* first_position, const int32_t* resets, int64_t* positions,
                               int64_t* next_position, int64_t length) {
  const int64_t b = blockIdx.x;
  if (resets != nullptr) resets += b * length;
  positions += b * length;
  int64_t start = first_position != nullptr ? -first_position[b] : 0;
  for (int64_t begin = 0; begin < length; begin += warp_size) {
    const int64_t t = begin + lane_index();
    if (resets != nullptr && t < length && resets[t] != 0) start = t;
    for (int delta = 1; delta < warp_size; delta *= 2) {
      const int64_t before = shuffle_up(start, delta);
      if (lane_index() >= delta && before > start) start = before;
    }
    if (t < length) positions[t] = t - start;
    start = shuffle(start, warp_size - 1);
  }
  if (lane_index() == 0) next_position[b] = length - start;
}

/// One thread a pair of one step, in a grid-stride loop. The angle is reduced to half a turn in double precision: in f32 it
/// would be off by as much as 0.03 at a position of a million.
__global__ void write_rotation(const int64_t* positions, float* rotation, int64_t n_steps, int64_t n_pairs) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const double exponent = n_pairs > 1 ? -log2(10000.0) / static_cast<double>(n_pairs - 1) : 0.0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_steps * n_pairs;
       i += stride) {
    const double theta = exp2(exponent * static_cast<double>(i % n_pairs));
    const double turns = static_cast<double>(positions[i / n_pairs]) * theta / two_pi;
    const float angle = static_cast<float>((turns - rint(turns)) * two_pi);
    rotation[2 * i] = cosf(angle);
    rotation[2 * i + 1] = sinf(angle);
  }
}

/// One thread a head of one step, in a grid-stride loop; those of the first step write log_decay too.
__global__ void write_decays(const int64_t* positions, float* row_scale, float* log_decay, int64_t n_steps,
                             int64_t n_heads) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_steps * n_heads;
       i += stride) {
    const double log_gamma = log1p(-exp2(-5.0 - static_cast<double>(i % n_heads)));
    const double n_tokens = static_cast<double>(positions[i / n_heads] + 1);
    const double ratio = expm1(log_gamma) / expm1(n_tokens * log_gamma);
    row_scale[i] = sqrtf(static_cast<float>(ratio));
    if (i < n_heads) log_decay[i] = static_cast<float>(log_gamma);
  }
}

LaunchShape shape_for(int64_t n) {
  return {.grid = {std::min(blocks_for(n, block), max_blocks)}, .block = block};
}

}  // namespace

void retention_schedule_cuda(const RetentionScheduleArgs& args) {
  require(args.rotation.dtype() == DType::f32,
          "retention_schedule: dtype {} is not supported on a GPU; use f32", name_of(args.rotation.dtype()));
  const int64_t n_steps = args.positions.numel(), n_pairs = args.rotation.dim(2),
                n_heads = args.log_decay.numel();
  const int64_t* positions = args.positions.data<int64_t>();
  launch("retention_positions", find_positions, {.grid = {args.positions.dim(0)}, .block = warp_size},
         args.first_position.data<int64_t>(), args.resets.data<int32_t>(), args.positions.data<int64_t>(),
         args.next_position.data<int64_t>(), args.positions.dim(1));
  launch("retention_rotation", write_rotation, shape_for(n_steps * n_pairs), positions,
         args.rotation.data<float>(), n_steps, n_pairs);
  launch("retention_decays", write_decays, shape_for(n_steps * n_heads), positions,
         args.row_scale.data<float>(), args.log_decay.data<float>(), n_steps, n_heads);
}

}  // namespace headwater
