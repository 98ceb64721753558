// Sums over rows on a GPU, in an order that the shape alone decides: each block writes the sum of its rows, and a second
// kernel adds the blocks in a fixed order. No atomics: same inputs, same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/tensor.h"

namespace headwater {

/// How the rows of a tensor are shared out to the blocks of a kernel that sums over them.
struct CudaRowBlocks {
  explicit CudaRowBlocks(int64_t n_rows)
      : rows(n_rows),
        rows_per_block(std::max<int64_t>(1, (n_rows + max_blocks - 1) / max_blocks)),
        n_blocks((n_rows + rows_per_block - 1) / rows_per_block) {}

  /// About two for each multiprocessor of the largest GPUs; a constant, so that the bits do not depend on the GPU.
  static constexpr int64_t max_blocks = 256;
  int64_t rows, rows_per_block, n_blocks;
};

/// How many warps a block may have if each needs so much shared memory: a power of two up to `most`, so that two blocks
/// fit a multiprocessor where that leaves more than one warp. Throws an input error that names `op` and its `channels` if
/// one warp's do not fit.
int warps_that_fit(const char* op, int most, int64_t bytes_per_warp, int64_t channels);

/// target[j] (+)= sum over blocks of partials[block, j], in an order that n_blocks decides.
///
/// Shapes   partials: f32 (n_blocks, width)   target: f32, width elements. An undefined target is not wanted.
void sum_partials_cuda(const Tensor& partials, const Tensor& target, bool accumulate);

}  // namespace headwater
