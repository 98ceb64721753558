#include <algorithm>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/rearrange/rearrange_kernels.h"

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;

/// One warp a row, its lanes side by side along the columns, N elements at a time. `width` is a multiple of N.
template <int N, class T>
__global__ void copy_rows(const T* source, T* target, int64_t rows, int64_t width, int64_t source_width,
                          int64_t target_width) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * n_warps();
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index(); row < rows; row += stride) {
    for (int64_t j = lane_index() * N; j < width; j += warp_size * N) {
      store_packed<N>(target + row * target_width + j, load_packed<N>(source + row * source_width + j));
    }
  }
}

constexpr int tile = 32;
constexpr int tile_rows = block / tile;  // that a block reads or writes at once

/// One block a tile of 32 x 32 of one of the matrices x (m, n). Shared: the tile, so that both the reading and the
/// writing are of neighbours; the column more keeps what is read down a column in different banks.
template <class T>
__global__ void transpose_tiles(const T* x, T* y, int64_t m, int64_t n) {
  SharedMemory shared;
  const SharedArray<T> elements = shared.array<T>(tile * (tile + 1));
  const int64_t tiles_m = (m + tile - 1) / tile, tiles_n = (n + tile - 1) / tile;
  const int64_t matrix = blockIdx.x / (tiles_m * tiles_n), within = blockIdx.x % (tiles_m * tiles_n);
  const int64_t first_row = within / tiles_n * tile, first_column = within % tiles_n * tile;
  const int column = static_cast<int>(threadIdx.x) % tile;
  x += matrix * m * n;
  y += matrix * m * n;
  for (int row = static_cast<int>(threadIdx.x) / tile; row < tile; row += tile_rows) {
    if (first_row + row < m && first_column + column < n) {
      elements[row * (tile + 1) + column] = x[(first_row + row) * n + first_column + column];
    }
  }
  sync_block();
  for (int row = static_cast<int>(threadIdx.x) / tile; row < tile; row += tile_rows) {
    if (first_column + row < n && first_row + column < m) {
      y[(first_column + row) * m + first_row + column] = elements[column * (tile + 1) + row];
    }
  }
}

/// One thread an element of x.
template <class T>
__global__ void repeat_elements(const T* x, T* y, int64_t size, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const T value = x[i];
  for (int64_t copy = 0; copy < count; ++copy) y[copy * size + i] = value;
}

/// One thread an element of y; sums in order.
template <class T>
__global__ void sum_copies(const T* x, T* y, int64_t size, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t copy = 0; copy < count; ++copy) sum += to_float(x[copy * size + i]);
  y[i] = from_float<T>(sum);
}

}  // namespace

void copy_columns_cuda(const CopyColumnsArgs& args) {
  dispatch_cuda(args.source.dtype(), "concat_last", [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / static_cast<int>(sizeof(T));
    const T* source = args.source.data<T>() + args.source_column;
    T* target = args.target.data<T>() + args.target_column;
    // Whether each row of both begins at a multiple of 16 bytes.
    const bool packed = args.width % N == 0 && args.source_width % N == 0 && args.target_width % N == 0 &&
                        reinterpret_cast<uintptr_t>(source) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(target) % 16 == 0;
    launch("copy_columns", packed ? copy_rows<N, T> : copy_rows<1, T>,
           {.grid = {std::min(blocks_for(args.rows, block / warp_size), max_blocks)}, .block = block}, source,
           target, args.rows, args.width, args.source_width, args.target_width);
  });
}

void transpose_last_cuda(const TransposeLastArgs& args) {
  const int64_t m = args.x.dim(-2), n = args.x.dim(-1);
  if (args.x.numel() == 0) return;
  dispatch_cuda(args.x.dtype(), "transpose_last", [&](auto element) {
    using T = decltype(element);
    launch("transpose_last", transpose_tiles<T>,
           {.grid = {args.x.numel() / (m * n) * blocks_for(m, tile) * blocks_for(n, tile)},
            .block = block,
            .shared_bytes = shared_bytes<T>(tile * (tile + 1))},
           args.x.data<T>(), args.y.data<T>(), m, n);
  });
}

void repeat_leading_cuda(const RepeatLeadingArgs& args) {
  dispatch_cuda(args.x.dtype(), "repeat_leading", [&](auto element) {
    using T = decltype(element);
    const int64_t size = args.x.numel();
    launch("repeat_leading", repeat_elements<T>, {.grid = {blocks_for(size, block)}, .block = block},
           args.x.data<T>(), args.y.data<T>(), size, args.y.dim(0));
  });
}

void sum_leading_cuda(const SumLeadingArgs& args) {
  dispatch_cuda(args.x.dtype(), "repeat_leading", [&](auto element) {
    using T = decltype(element);
    const int64_t size = args.y.numel();
    launch("sum_leading", sum_copies<T>, {.grid = {blocks_for(size, block)}, .block = block},
           args.x.data<T>(), args.y.data<T>(), size, args.x.dim(0));
  });
}

}  // namespace headwater
