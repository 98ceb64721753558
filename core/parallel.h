// Threads: loops split over OpenMP's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

namespace headwater {

/// How many threads parallel_for and the GEMM library use. Set once at start; 0 means all cores.
void set_n_threads(int n_threads);
int n_threads();

/// Calls body(begin, end) on disjoint ranges that cover [0, n), in parallel. Ranges hold at least `grain`
/// items, so that small loops stay on one thread. The split depends on the number of threads: a reduction
/// whose bits must not depend on it uses fixed blocks of its own (RowBlocks). `body` must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t pieces =
      std::min<int64_t>(n_threads(), std::max<int64_t>(1, n / std::max<int64_t>(1, grain)));
  if (pieces <= 1) {
    body(int64_t{0}, n);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(static_cast <int>(pieces))
  for (int64_t piece = 0; piece < pieces; ++piece) {
    body(n * piece / pieces, n * (piece + 1) / pieces);
  }
}

/// Calls body(item) for every item in [0, n), each item a sizeable piece of work, threads taking the next
/// one as they finish. Results must not depend on who takes what.
template <class Body>
void parallel_for_each(int64_t n, const Body& body) {
  const int threads = static_cast<int>(std::min<int64_t>(n_threads(), n));
  if (threads <= 1) {
    for (int64_t item = 0; item < n; ++item) body(item);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < n; ++item) body(item);
}

/// Rows cut into at most 64 blocks, whatever the number of threads: sums over rows are taken block by block
/// and the blocks added in order, so that their bits depend on the shape alone.
struct RowBlocks {
  explicit RowBlocks(int64_t n_rows)
      : rows(n_rows),
        rows_per_block(std::max<int64_t>(8, (n_rows + 63) / 64)),
        n_blocks((n_rows + rows_per_block - 1) / rows_per_block) {}
  int64_t begin(int64_t block) const { return block * rows_per_block; }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * rows_per_block); }

  int64_t rows;
  int64_t rows_per_block;
  int64_t n_blocks;
};

/// target[j] (+)= sum over blocks of partials[block * width + j], blocks in order.
template <class T>
void sum_blocks(const T* partials, int64_t n_blocks, int64_t width, bool accumulate, T* target) {
  for (int64_t j = 0; j < width; ++j) {
    T sum = accumulate ? target[j] : T{0};
    for (int64_t block = 0; block < n_blocks; ++block) sum += partials[block * width + j];
    target[j] = sum;
  }
}

}  // namespace headwater
