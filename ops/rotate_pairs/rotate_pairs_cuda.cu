#include <algorithm>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/packed_rows.h"
#include "ops/rotate_pairs/rotate_pairs_kernels.h"

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;

/// One thread N neighbouring channels of a row, a pair or two, in a grid-stride loop: bound by memory.
template <class T, int N>
__global__ void rotate(const T* x, const float* rotation, const float* row_scale, T* y, int64_t rows,
                       int64_t n_heads, int64_t d, float factor, float direction) {
  const int64_t threads_per_row = d / N, n = rows * threads_per_row;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const int64_t row = i / threads_per_row, j = i % threads_per_row * N;
    const float s = factor * (row_scale != nullptr ? row_scale[row] : 1.0f);
    float values[N], turn[N], rotated[N];
    load_floats(x + row * d + j, values);
    load_floats(rotation + row / n_heads * d + j, turn);
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const float cosine = s * turn[k], sine = s * direction * turn[k + 1];
      rotated[k] = values[k] * cosine - values[k + 1] * sine;
      rotated[k + 1] = values[k + 1] * cosine + values[k] * sine;
    }
    store_floats(y + row * d + j, rotated);
  }
}

}  // namespace

void rotate_pairs_cuda(const RotatePairsArgs& args) {
  const int64_t rows = rows_of(args.x.shape()), n_heads = args.x.dim(2), d = args.x.dim(3);
  dispatch_cuda(args.x.dtype(), "rotate_pairs", [&](auto element) {
    using T = decltype(element);
    const T* x = args.x.data<T>();
    const float* rotation = args.rotation.data<float>();
    T* y = args.y.data<T>();
    const bool packed = can_pack(d, {x, rotation, y});
    launch("rotate_pairs", packed ? rotate<T, 4> : rotate<T, 2>,
           {.grid = {std::min(blocks_for(args.x.numel() / (packed ? 4 : 2), block), max_blocks)},
            .block = block},
           x, rotation, args.row_scale.data<float>(), y, rows, n_heads, d, static_cast<float>(args.factor),
           args.backwards ? -1.0f : 1.0f);
  });
}

}  // namespace headwater
