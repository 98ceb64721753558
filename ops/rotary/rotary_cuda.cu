#include <cmath>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/rotary/rotary_kernels.h"

namespace headwater {
namespace {

constexpr int block = 128;

struct Rotation {
  int64_t rows;
  int n_heads, head_dim, n_pairs;
  double log_base;  // times -2 / dim
  bool interleaved, backwards;
};

/// One warp a step, its lanes the pairs of channels: an angle is computed once for all heads.
template <class T>
__global__ void rotate(const T* x, const int32_t* positions, T* y, Rotation rotation) {
  constexpr double two_pi = 6.283185307179586476925286766559;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (row >= rotation.rows) return;
  x += row * rotation.n_heads * rotation.head_dim;
  y += row * rotation.n_heads * rotation.head_dim;
  const double position = rotation.backwards ? -positions[row] : positions[row];
  const int pair_step = rotation.interleaved ? 2 : 1, to_second = rotation.interleaved ? 1 : rotation.n_pairs;
  for (int c = lane_index(); c < rotation.n_pairs; c += warp_size) {
    // In turns and in f64, less the whole ones: f32 would lose the angle's fraction at large positions.
    const double turns = position * exp(rotation.log_base * c) / two_pi;
    const float angle = static_cast<float>((turns - floor(turns)) * two_pi);
    const float cosine = cosf(angle), sine = sinf(angle);
    for (int h = 0; h < rotation.n_heads; ++h) {
      const int64_t at = static_cast<int64_t>(h) * rotation.head_dim + c * pair_step;
      const float first = to_float(x[at]), second = to_float(x[at + to_second]);
      y[at] = from_float<T>(first * cosine - second * sine);
      y[at + to_second] = from_float<T>(first * sine + second * cosine);
    }
  }
  for (int h = 0; h < rotation.n_heads; ++h) {
    for (int p = 2 * rotation.n_pairs + lane_index(); p < rotation.head_dim; p += warp_size) {
      const int64_t at = static_cast<int64_t>(h) * rotation.head_dim + p;
      y[at] = x[at];
    }
  }
}

}  // namespace

void rotary_cuda(const RotaryArgs& args) {
  const Rotation rotation{args.positions.numel(),
                          static_cast<int>(args.x.dim(2)),
                          static_cast<int>(args.x.dim(3)),
                          static_cast<int>(args.dim / 2),
                          -2.0 * std::log(args.base) / static_cast<double>(args.dim),
                          args.interleaved,
                          args.backwards};
  dispatch_cuda(args.x.dtype(), "rotary", [&](auto element) {
    using T = decltype(element);
    launch("rotary", rotate<T>, {.grid = {blocks_for(rotation.rows, block / warp_size)}, .block = block},
           args.x.data<T>(), args.positions.data<int32_t>(), args.y.data<T>(), rotation);
  });
}

}  // namespace headwater
