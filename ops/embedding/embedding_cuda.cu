#include <algorithm>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/embedding/embedding_kernels.h"

// The forward copies rows. For the backward, each row of the table must find the positions that looked it up, in their
// order, without a sort and without atomics. Two splittings do that: of all positions into buckets of about
// sqrt(vocab_size) rows each, then of each bucket into its rows. Whoever collects a part reads the list that it is split
// from twice, to count and to fill, so it all costs about 6 n_tokens sqrt(vocab_size) reads, of numbers that lie in the
// second-level cache: 44 million for 32k tokens and 50k rows. Then each row adds its gradients up. A row that most
// positions look up takes the longest, since only its columns and a few warps share it.

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;
constexpr int warps_per_block = block / warp_size;

/// A token as the row that it looks up. What is not in the vocabulary, negative numbers too, is behind all rows.
__device__ int64_t row_of(int32_t token) {
  return static_cast<uint32_t>(token);
}

/// One warp a token, its lanes side by side along the columns, N at a time; d_model is a multiple of N. The host cannot
/// look at tokens that lie on a GPU: one outside the vocabulary gives NaN, which the loss shows, and reads nothing.
template <int N, class W, class Y>
__global__ void forward(const int32_t* tokens, const W* weight, Y* y, int64_t n_tokens, int64_t vocab_size,
                        int64_t d_model) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * n_warps();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index(); i < n_tokens; i += stride) {
    const int64_t row = row_of(tokens[i]);
    for (int64_t j = lane_index() * N; j < d_model; j += warp_size * N) {
      Packed<Y, N> to;
      if (row < vocab_size) {
        const Packed<W, N> from = load_packed<N>(weight + row * d_model + j);
#pragma unroll
        for (int k = 0; k < N; ++k) to.values[k] = from_float<Y>(to_float(from.values[k]));
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) to.values[k] = from_float<Y>(nanf(""));
      }
      store_packed<N>(y + i * d_model + j, to);
    }
  }
}

/// Positions of tokens: list i is positions[begins[i]] and the counts[i] - 1 behind it, in ascending order.
struct Lists {
  int64_t *positions, *begins, *counts;
};

/// The sum over the block's threads. `scratch` holds a number for each warp and may be used again at once.
__device__ int64_t sum_of_threads(int64_t value, SharedArray<int64_t> scratch) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  int64_t sum = 0;
  for (int warp = 0; warp < n_warps(); ++warp) sum += scratch[warp];
  sync_block();
  return sum;
}

/// How many of the threads before this one have `flag` set, and how many of all.
struct FlagCounts {
  int before, all;
};
__device__ FlagCounts count_flags(bool flag, SharedArray<int> scratch) {
  int up_to_here = flag ? 1 : 0;
  for (int delta = 1; delta < warp_size; delta *= 2) {
    const int other = shuffle_up(up_to_here, delta);
    if (lane_index() >= delta) up_to_here += other;
  }
  if (lane_index() == warp_size - 1) scratch[warp_index()] = up_to_here;
  sync_block();
  FlagCounts result{up_to_here - (flag ? 1 : 0), 0};
  for (int warp = 0; warp < n_warps(); ++warp) {
    const int count = scratch[warp];
    if (warp < warp_index()) result.before += count;
    result.all += count;
  }
  sync_block();
  return result;
}

/// Splits lists of positions by the rows that they look up: block i makes the list of rows [i * n_rows, (i + 1) *
/// n_rows) out of the list `from` number i / n_parts, or out of all n_tokens positions where from.positions is null. The
/// parts of a list lie one behind the other in the place that it has itself. Shared: two scratches of a number for each
/// warp.
__global__ void split(const int32_t* tokens, int64_t n_tokens, int64_t vocab_size, Lists from,
                      int64_t n_parts, int64_t n_rows, Lists to) {
  SharedMemory shared;
  const SharedArray<int64_t> sum_scratch = shared.array<int64_t>(n_warps());
  const SharedArray<int> count_scratch = shared.array<int>(n_warps());
  const bool all = from.positions == nullptr;
  const int64_t source = blockIdx.x / n_parts;
  const int64_t begin = all ? 0 : from.begins[source], count = all ? n_tokens : from.counts[source];
  const int64_t first_row = blockIdx.x * n_rows;
  const int64_t last_row = first_row + n_rows < vocab_size ? first_row + n_rows : vocab_size;

  // Tokens of earlier rows go before.
  int64_t n_before = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    n_before += row_of(tokens[all ? i : from.positions[begin + i]]) < first_row ? 1 : 0;
  }
  const int64_t to_begin = begin + sum_of_threads(n_before, sum_scratch);
  int64_t to_count = 0;
  for (int64_t i0 = 0; i0 < count; i0 += blockDim.x) {
    const int64_t i = i0 + threadIdx.x;
    int64_t position = 0;
    bool is_ours = false;
    if (i < count) {
      position = all ? i : from.positions[begin + i];
      const int64_t row = row_of(tokens[position]);
      is_ours = row >= first_row && row < last_row;
    }
    const FlagCounts flags = count_flags(is_ours, count_scratch);
    if (is_ours) to.positions[to_begin + to_count + flags.before] = position;
    to_count += flags.all;
  }
  if (threadIdx.x == 0) {
    to.begins[blockIdx.x] = to_begin;
    to.counts[blockIdx.x] = to_count;
  }
}

/// `warps_per_row` neighbouring warps a row of grad_weight, and of its columns 32 N (blockIdx.y says which): a lane has
/// N, which are neighbours. The warps take the row's positions in turn. Shared: the sums of every thread, which the
/// row's first warp adds in the order of the warps. d_model is a multiple of N.
template <int N, class Y>
__global__ void sum_rows(const Y* grad_y, Lists rows, float* grad_weight, int64_t vocab_size, int64_t d_model,
                         int warps_per_row, bool accumulate) {
  SharedMemory shared;
  const SharedArray<float> sums = shared.array<float>(block * N);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (n_warps() / warps_per_row) + warp_index() / warps_per_row;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * warp_size + lane_index()) * N;
  const bool is_inside = row < vocab_size && column < d_model;
  float sum[N] = {};
  if (is_inside) {
    const int64_t* positions = rows.positions + rows.begins[row];
    const int64_t count = rows.counts[row];
#pragma unroll 4
    for (int64_t i = warp_index() % warps_per_row; i < count; i += warps_per_row) {
      const Packed<Y, N> given = load_packed<N>(grad_y + positions[i] * d_model + column);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += to_float(given.values[k]);
    }
  }
  if (warps_per_row > 1) {
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k * block + thread] = sum[k];
    sync_block();
    if (warp_index() % warps_per_row != 0) return;
    for (int warp = 1; warp < warps_per_row; ++warp) {
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += sums[k * block + thread + warp * warp_size];
    }
  }
  if (!is_inside) return;
  float* target = grad_weight + row * d_model + column;
  Packed<float, N> result;
  if (accumulate) result = load_packed<N>(target);
#pragma unroll
  for (int k = 0; k < N; ++k) result.values[k] = accumulate ? result.values[k] + sum[k] : sum[k];
  store_packed<N>(target, result);
}

/// Room for `n_lists` lists; `keeper` is what holds it.
Lists make_lists(int64_t n_tokens, int64_t n_lists, Device device, Tensor& keeper) {
  keeper = Tensor::empty({n_tokens + 2 * n_lists}, DType::i64, device);
  int64_t* first = keeper.data<int64_t>();
  return {first, first + n_tokens, first + n_tokens + n_lists};
}

void launch_split(const int32_t* tokens, int64_t n_tokens, int64_t vocab_size, const Lists& from,
                  int64_t n_parts, int64_t n_rows, const Lists& to, int threads) {
  launch(
      "embedding_split", split,
      {.grid = {blocks_for(vocab_size, n_rows)},
       .block = threads,
       .shared_bytes = shared_bytes<int64_t>(threads / warp_size) + shared_bytes<int>(threads / warp_size)},
      tokens, n_tokens, vocab_size, from, n_parts, n_rows, to);
}

/// About the root of n, at least 1.
int64_t root_of(int64_t n) {
  int64_t root = 1;
  while (root * root < n) ++root;
  return root;
}

template <int N, class T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (N * sizeof(T)) == 0;
}

}  // namespace

void embedding_forward_cuda(const EmbeddingForwardArgs& args) {
  dispatch_cuda(args.weight.dtype(), "embedding", [&](auto weight_element) {
    dispatch_cuda(args.y.dtype(), "embedding", [&](auto y_element) {
      using W = decltype(weight_element);
      using Y = decltype(y_element);
      constexpr int N = 16 / static_cast<int>(std::max(sizeof(W), sizeof(Y)));
      const int64_t d_model = args.weight.dim(1), n_tokens = args.tokens.numel();
      const W* weight = args.weight.data<W>();
      Y* y = args.y.data<Y>();
      const bool packed = d_model % N == 0 && is_aligned<N>(weight) && is_aligned<N>(y);
      launch("embedding_forward", packed ? forward<N, W, Y> : forward<1, W, Y>,
             {.grid = {std::min(blocks_for(n_tokens, warps_per_block), max_blocks)}, .block = block},
             args.tokens.data<int32_t>(), weight, y, n_tokens, args.weight.dim(0), d_model);
    });
  });
}

void embedding_backward_cuda(const EmbeddingBackwardArgs& args) {
  const int64_t n_tokens = args.tokens.numel();
  const int64_t vocab_size = args.grad_weight.dim(0), d_model = args.grad_weight.dim(1);
  if (vocab_size == 0) return;
  const int32_t* tokens = args.tokens.data<int32_t>();
  const Device device = args.tokens.device();
  const int64_t rows_per_bucket = root_of(vocab_size);
  Tensor keep_buckets, keep_rows;
  const Lists buckets = make_lists(n_tokens, blocks_for(vocab_size, rows_per_bucket), device, keep_buckets);
  const Lists rows = make_lists(n_tokens, vocab_size, device, keep_rows);
  // Few buckets read a long list each, many rows a short one.
  launch_split(tokens, n_tokens, vocab_size, {}, blocks_for(vocab_size, rows_per_bucket), rows_per_bucket,
               buckets, 512);
  launch_split(tokens, n_tokens, vocab_size, buckets, rows_per_bucket, 1, rows, 64);

  // More warps for a row where rows are looked up often: a function of the shapes, so that the order of the sum is.
  int warps_per_row = 1;
  while (warps_per_row < warps_per_block && n_tokens > 8 * warps_per_row * vocab_size) warps_per_row *= 2;
  dispatch_cuda(args.grad_y.dtype(), "embedding", [&](auto element) {
    using Y = decltype(element);
    constexpr int N = 4;
    const Y* grad_y = args.grad_y.data<Y>();
    float* grad_weight = args.grad_weight.data<float>();
    const bool packed = d_model % N == 0 && is_aligned<N>(grad_y) && is_aligned<N>(grad_weight);
    const int columns = warp_size * (packed ? N : 1);  // of a warp
    launch("embedding_sum_rows", packed ? sum_rows<N, Y> : sum_rows<1, Y>,
           {.grid = {blocks_for(vocab_size, warps_per_block / warps_per_row), blocks_for(d_model, columns)},
            .block = block,
            .shared_bytes = shared_bytes<float>(block * (packed ? N : 1))},
           grad_y, rows, grad_weight, vocab_size, d_model, warps_per_row, args.accumulate_weight);
  });
}

}  // namespace headwater
