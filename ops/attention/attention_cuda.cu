// Attention in tiles of 64 queries x 64 keys on the matrix units; attention_cpu.cpp has the equations, and why the backward
// has a pass over the queries and one over the keys.
//
// Heads wider than what is in shared memory at a time (`columns`: 64 channels, or 128 of bf16) are taken in slices: the
// scores are summed over slices, and a block owns one slice of its results, computing the scores again. Tiles that no query
// of theirs sees are left out. Exponentials are of base 2, with log2(e) in the scores' factor.
//
// Indices: b sequence, h head, t query, s key, p channel; t0, s0, p0 where a tile or slice begins.

#include <cmath>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "core/cuda/matrix_unit.h"
#include "ops/attention/attention_kernels.h"

namespace headwater {
namespace {

constexpr int tile_size = 64;
// The blocks that __launch_bounds__ asks to fit a multiprocessor below are as many as leave no register spilled.
constexpr int forward_block = 128;   // 4 warps, each with 16 queries
constexpr int backward_block = 256;  // 8 warps: warp w has rows 16 (w % 4) ... and a half of the columns
constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.693147180559945309f;

/// Depths and widths of products are multiples of 16; what is beyond the data is zero.
HEADWATER_HOST_DEVICE constexpr int padded(int size) {
  return (size + 15) / 16 * 16;
}

struct Sizes {
  int64_t batch, n_queries, n_keys, window;
  int n_heads, n_kv_heads, head_dim, n_slices;
  float scale;

  HEADWATER_HOST_DEVICE int64_t query_tiles() const { return (n_queries + tile_size - 1) / tile_size; }
  HEADWATER_HOST_DEVICE int64_t key_tiles() const { return (n_keys + tile_size - 1) / tile_size; }
  HEADWATER_HOST_DEVICE int heads_per_group() const { return n_heads / n_kv_heads; }
  HEADWATER_HOST_DEVICE int64_t query_step() const { return static_cast<int64_t>(n_heads) * head_dim; }
  HEADWATER_HOST_DEVICE int64_t key_step() const { return static_cast<int64_t>(n_kv_heads) * head_dim; }
  // Where things begin.
  HEADWATER_HOST_DEVICE int64_t query_at(int64_t b, int64_t t, int h) const {
    return ((b * n_queries + t) * n_heads + h) * head_dim;
  }
  HEADWATER_HOST_DEVICE int64_t key_at(int64_t b, int64_t s, int group) const {
    return ((b * n_keys + s) * n_kv_heads + group) * head_dim;
  }
  HEADWATER_HOST_DEVICE int64_t row_at(int64_t b, int h, int64_t t) const {
    return (b * n_heads + h) * n_queries + t;
  }
};

/// What a query sees: the steps from `first` to `own`. Beyond the queries: none.
struct Visible {
  int first, own;

  __device__ Visible(const Sizes& sizes, const int32_t* positions, int64_t b, int64_t t) : first(0), own(-1) {
    if (t >= sizes.n_queries) return;
    own = static_cast<int>(sizes.n_keys - sizes.n_queries + t);
    int reach = sizes.window < own ? static_cast<int>(sizes.window) : own;
    if (positions != nullptr) {
      const int position = positions[b * sizes.n_queries + t];
      reach = position < reach ? position : reach;
    }
    first = own - reach;
  }
};

template <class T>
struct Inputs {
  const T *q, *k, *v;
  const int32_t* positions;  // nullptr: none
};

/// A block's tile and slice, of a grid of batch * n_heads * n_tiles * n_slices. The last tiles begin first: they are the
/// longest in the pass over queries.
struct Place {
  int64_t b, tile;
  int h, p0;

  __device__ Place(const Sizes& sizes, int n_heads, int64_t n_tiles, int columns) {
    int64_t rest = blockIdx.x;
    p0 = static_cast<int>(rest % sizes.n_slices) * columns;
    rest /= sizes.n_slices;
    h = static_cast<int>(rest % n_heads);
    rest /= n_heads;
    b = rest % sizes.batch;
    tile = n_tiles - 1 - rest / sizes.batch;
  }
};

// ---- shared memory

/// Rows are 16 bytes longer than their data (core/cuda/matrix_unit.h).
template <class T>
HEADWATER_HOST_DEVICE constexpr int row_step(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}
template <class T>
constexpr int64_t tile_bytes(int columns) {
  return shared_bytes<T>(tile_size * row_step<T>(columns));
}
template <class T, int columns>
__device__ inline SharedRows<T> shared_tile(SharedMemory& shared) {
  return {shared.array<T>(tile_size * row_step<T>(columns)), 0, row_step<T>(columns)};
}

/// Rows of one head in global memory, from a tile's first on: `rows` of them up to the end of the sequence.
template <class T>
struct HeadRows {
  const T* data;
  int64_t step;
  int rows;

  __device__ HeadRows(const T* tensor, int64_t offset, int64_t row_step, int64_t rows_left)
      : data(tensor + offset),
        step(row_step),
        rows(rows_left < tile_size ? static_cast<int>(rows_left) : tile_size) {}
};

/// Channels p0 ... of the rows; zeros up to the tile's rows and padded(channels). Visible after finish_copies().
template <class T>
__device__ inline void copy_slice(const SharedRows<T>& to, const HeadRows<T>& from, int p0, int channels) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const T* data = from.data + p0;
  const int columns = padded(channels), packs = columns / width, first = static_cast<int>(threadIdx.x);
  if (channels % width == 0 && from.step % width == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    for (int item = first; item < tile_size * packs; item += static_cast<int>(blockDim.x)) {
      const int row = item / packs, column = item % packs * width, index = row * to.row_step + column;
      if (row < from.rows && column < channels) {
        copy_async(to.data, to.offset + index, data + row * from.step + column);
      } else {
        to.data.template store<width>(to.offset + index, Packed<T, width>{});
      }
    }
    return;
  }
  for (int item = first; item < tile_size * columns; item += static_cast<int>(blockDim.x)) {
    const int row = item / columns, column = item % columns;
    to.set(row, column, row < from.rows && column < channels ? data[row * from.step + column] : T{});
  }
}

__device__ inline void finish_copies() {
  commit_copies();
  wait_copies<0>();
  sync_block();
}

__device__ inline int slice_channels(const Sizes& sizes, int p0, int columns) {
  return sizes.head_dim - p0 < columns ? sizes.head_dim - p0 : columns;
}

/// Two neighbours of a row of `channels` elements, the first at to[column].
template <class T>
__device__ inline void store_pair(T* to, int column, int channels, float value, float next) {
  T* at = to + column;
  if (column + 1 < channels && reinterpret_cast<uintptr_t>(at) % (2 * sizeof(T)) == 0) {
    store_packed(at, Packed<T, 2>{from_float<T>(value), from_float<T>(next)});
    return;
  }
  if (column < channels) at[0] = from_float<T>(value);
  if (column + 1 < channels) at[1] = from_float<T>(next);
}
template <class T>
__device__ inline void store_pair(const SharedRows<T>& to, int row, int column, float value, float next) {
  to.data.store(to.offset + row * to.row_step + column,
                Packed<T, 2>{from_float<T>(value), from_float<T>(next)});
}

/// body(half, row, column, value, next): two neighbours in a row at a time. A thread's values lie in two rows; `half`, known
/// when compiling, says in which.
template <int n_tiles, class Body>
__device__ inline void for_each_pair(WarpTile<1, n_tiles>& tile, const Body& body) {
#pragma unroll
  for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float(&values)[4] = tile.fragments[0][n].values;
      body(half, fragment_row(2 * half), 8 * n + fragment_column(0), values[2 * half], values[2 * half + 1]);
    }
  }
}

// ---- forward

/// The running softmax of the two queries whose scores a thread's four lanes hold between them.
struct RunningSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};  // of the scores times log2(e)
  float sums[2] = {0.0f, 0.0f};               // of the calling lane's columns

  /// Scores become weights relative to the new maximum; before[half] is what brings earlier sums to it.
  __device__ void weigh(WarpTile<1, tile_size / 8>& scores, const Visible* rows, int64_t s0, float scale,
                        float (&before)[2]) {
    float maximum[2] = {largest[0], largest[1]};
    const auto visible = [&](int half, int column) {
      const int s = static_cast<int>(s0) + column;
      return s >= rows[half].first && s <= rows[half].own;
    };
    for_each_pair(scores, [&](int half, int, int column, float& value, float& next) {
      value = visible(half, column) ? value * scale : -INFINITY;
      next = visible(half, column + 1) ? next * scale : -INFINITY;
      maximum[half] = fmaxf(maximum[half], fmaxf(value, next));
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = fmaxf(maximum[half], shuffle_xor(maximum[half], 1));
      maximum[half] = fmaxf(maximum[half], shuffle_xor(maximum[half], 2));
      // A query that has seen no key yet keeps -infinity, from which nothing may be subtracted.
      const float base = maximum[half] == -INFINITY ? 0.0f : maximum[half];
      before[half] = exp2f(largest[half] - base);
      largest[half] = maximum[half];
      maximum[half] = base;
      sums[half] *= before[half];
    }
    for_each_pair(scores, [&](int half, int, int, float& value, float& next) {
      value = exp2f(value - maximum[half]);
      next = exp2f(next - maximum[half]);
      sums[half] += value + next;
    });
  }

  /// The whole row's sum.
  __device__ float total(int half) const {
    const float pair = sums[half] + shuffle_xor(sums[half], 1);
    return pair + shuffle_xor(pair, 2);
  }
};

template <class T>
constexpr int64_t forward_bytes(int columns) {
  return 3 * tile_bytes<T>(columns) + tile_bytes<T>(tile_size);
}

/// A block owns 64 queries of a head, and a slice of their results; a warp 16 of them. Shared: queries, keys, values (64 x
/// columns each) and weights (64 x 64, each warp's rows its own).
template <class T, int columns>
__global__ void __launch_bounds__(forward_block, sizeof(T) == sizeof(float) || columns > 64 ? 2 : 3)
    forward(Inputs<T> in, T* y, float* log_sums, Sizes sizes) {
  SharedMemory shared;
  const SharedRows<T> queries = shared_tile<T, columns>(shared), keys = shared_tile<T, columns>(shared);
  const SharedRows<T> values = shared_tile<T, columns>(shared), weights = shared_tile<T, tile_size>(shared);
  const Place place(sizes, sizes.n_heads, sizes.query_tiles(), columns);
  const int group = place.h / sizes.heads_per_group(), first_row = 16 * warp_index();
  const int64_t t0 = place.tile * tile_size;
  const int64_t last_query = t0 + tile_size < sizes.n_queries ? t0 + tile_size - 1 : sizes.n_queries - 1;
  const int64_t last_key = sizes.n_keys - sizes.n_queries + last_query;
  const Visible rows[2] = {Visible(sizes, in.positions, place.b, t0 + first_row + fragment_row(0)),
                           Visible(sizes, in.positions, place.b, t0 + first_row + fragment_row(2))};
  const HeadRows<T> query_rows(in.q, sizes.query_at(place.b, t0, place.h), sizes.query_step(),
                               sizes.n_queries - t0);
  const int channels = slice_channels(sizes, place.p0, columns);

  RunningSoftmax softmax;
  WarpTile<1, columns / 8> sums;
  sums.clear();
  const int64_t first_tile = Visible(sizes, in.positions, place.b, t0).first / tile_size * tile_size;
  for (int64_t s0 = first_tile; s0 <= last_key; s0 += tile_size) {
    const int64_t key_offset = sizes.key_at(place.b, s0, group);
    WarpTile<1, tile_size / 8> scores;
    scores.clear();
    copy_slice(values, HeadRows<T>(in.v, key_offset, sizes.key_step(), sizes.n_keys - s0), place.p0,
               channels);
    for (int p0 = 0; p0 < sizes.head_dim; p0 += columns) {
      const int depth = slice_channels(sizes, p0, columns);
      if (p0 > 0) sync_block();
      if (sizes.n_slices > 1 || s0 == first_tile) copy_slice(queries, query_rows, p0, depth);
      copy_slice(keys, HeadRows<T>(in.k, key_offset, sizes.key_step(), sizes.n_keys - s0), p0, depth);
      finish_copies();
      scores.add_product(queries.at(first_row, 0), keys.transposed(), padded(depth), tile_size);
    }
    float before[2];
    softmax.weigh(scores, rows, s0, sizes.scale * log2_e, before);
    for_each_pair(scores, [&](int, int row, int column, float value, float next) {
      store_pair(weights, first_row + row, column, value, next);
    });
    for_each_pair(sums, [&](int half, int, int, float& value, float& next) {
      value *= before[half];
      next *= before[half];
    });
    sync_warp();
    sums.add_product(weights.at(first_row, 0), values, tile_size, padded(channels));
    sync_block();
  }

  const float totals[2] = {softmax.total(0), softmax.total(1)};
  for_each_pair(sums, [&](int half, int row, int column, float value, float next) {
    const int64_t t = t0 + first_row + row;
    if (t >= sizes.n_queries) return;
    store_pair(y + sizes.query_at(place.b, t, place.h) + place.p0, column, channels, value / totals[half],
               next / totals[half]);
  });
  if (place.p0 > 0 || lane_index() % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t t = t0 + first_row + fragment_row(2 * half);
    if (t >= sizes.n_queries) continue;
    log_sums[sizes.row_at(place.b, place.h, t)] = ln_2 * (softmax.largest[half] + log2f(totals[half]));
  }
}

// ---- backward

/// delta = grad_y . y. One warp a query and head, in the order of y.
template <class T>
__global__ void row_deltas(const T* y, const T* grad_y, float* delta, Sizes sizes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (row >= sizes.batch * sizes.n_queries * sizes.n_heads) return;
  float sum = 0.0f;
  for (int p = lane_index(); p < sizes.head_dim; p += warp_size) {
    sum += to_float(y[row * sizes.head_dim + p]) * to_float(grad_y[row * sizes.head_dim + p]);
  }
  sum = warp_sum(sum);
  const int h = static_cast<int>(row % sizes.n_heads);
  const int64_t t = row / sizes.n_heads % sizes.n_queries, b = row / sizes.n_heads / sizes.n_queries;
  if (lane_index() == 0) delta[sizes.row_at(b, h, t)] = sum;
}

template <class T>
struct BackwardInputs {
  Inputs<T> forward;
  const T* grad_y;
  const float *log_sums, *delta;
};

/// What the backward knows of 64 queries of one head, in shared memory.
struct QueryTile {
  SharedArray<int32_t> first, own;
  SharedArray<float> log_sums, delta;  // log_sums times log2(e)

  __device__ explicit QueryTile(SharedMemory& shared)
      : first(shared.array<int32_t>(tile_size)),
        own(shared.array<int32_t>(tile_size)),
        log_sums(shared.array<float>(tile_size)),
        delta(shared.array<float>(tile_size)) {}
  static constexpr int64_t bytes = 2 * shared_bytes<int32_t>(tile_size) + 2 * shared_bytes<float>(tile_size);

  /// Visible after sync_block().
  template <class T>
  __device__ void load(const BackwardInputs<T>& in, const Sizes& sizes, int64_t b, int h, int64_t t0) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= tile_size) return;
    const Visible visible(sizes, in.forward.positions, b, t0 + i);
    const bool inside = t0 + i < sizes.n_queries;
    first[i] = visible.first;
    own[i] = visible.own;
    log_sums[i] = inside ? in.log_sums[sizes.row_at(b, h, t0 + i)] * log2_e : 0.0f;
    delta[i] = inside ? in.delta[sizes.row_at(b, h, t0 + i)] : 0.0f;
  }

  /// P and scale dS of query i and key s, from the score and dP; 0 where it is not seen.
  __device__ void weigh(int i, int64_t s, float scale, float& score, float& grad) const {
    const bool visible = s >= first[i] && s <= own[i];
    score = visible ? exp2f(score * scale * log2_e - log_sums[i]) : 0.0f;
    grad = visible ? scale * score * (grad - delta[i]) : 0.0f;
  }
};

/// Where a warp's part of a block's 64 x 64 products and 64 x columns results begins.
__device__ inline int warp_row() {
  return 16 * (warp_index() % 4);
}
__device__ inline int warp_column(int columns) {
  return columns / 2 * (warp_index() / 4);
}

using Scores = WarpTile<1, tile_size / 16>;
template <int columns>
using Results = WarpTile<1, columns / 16>;

/// The tiles behind two products over the channels: S = a b^T and dP = grad_a grad_b^T. In the pass over queries a and
/// grad_a are q and grad_y, b and grad_b are k and v; in the pass over keys, where S is transposed, the other way round.
template <class T, int columns>
struct ScoreTiles {
  SharedRows<T> a, grad_a, b, grad_b;

  __device__ explicit ScoreTiles(SharedMemory& shared)
      : a(shared_tile<T, columns>(shared)),
        grad_a(shared_tile<T, columns>(shared)),
        b(shared_tile<T, columns>(shared)),
        grad_b(shared_tile<T, columns>(shared)) {}

  /// With one slice, a and grad_a are copied if `is_first` only. At the end slice p_end is in b and grad_b.
  __device__ void multiply_rows(const HeadRows<T>& a_rows, const HeadRows<T>& grad_a_rows,
                                const HeadRows<T>& b_rows, const HeadRows<T>& grad_b_rows, bool is_first,
                                int p_end, const Sizes& sizes, Scores& scores, Scores& grads) const {
    const int row = warp_row(), column = warp_column(tile_size);
    scores.clear();
    grads.clear();
    for (int p0 = 0; p0 < sizes.head_dim; p0 += columns) {
      const int depth = slice_channels(sizes, p0, columns);
      if (p0 > 0) sync_block();
      if (sizes.n_slices > 1 || is_first) {
        copy_slice(a, a_rows, p0, depth);
        copy_slice(grad_a, grad_a_rows, p0, depth);
      }
      copy_slice(b, b_rows, p0, depth);
      copy_slice(grad_b, grad_b_rows, p0, depth);
      finish_copies();
      scores.add_product(a.at(row, 0), b.transposed().at(0, column), padded(depth), tile_size / 2);
      grads.add_product(grad_a.at(row, 0), grad_b.transposed().at(0, column), padded(depth), tile_size / 2);
    }
    if (sizes.n_slices == 1) return;
    sync_block();
    copy_slice(b, b_rows, p_end, slice_channels(sizes, p_end, columns));
    copy_slice(grad_b, grad_b_rows, p_end, slice_channels(sizes, p_end, columns));
    finish_copies();
  }
};

/// results += weights right, of the first padded(channels) columns.
template <int columns, class T>
__device__ inline void add_results(Results<columns>& results, const SharedRows<T>& weights,
                                   const SharedRows<T>& right, int channels) {
  const int column = warp_column(columns);
  results.add_product(weights.at(warp_row(), 0), right.at(0, column), tile_size, padded(channels) - column);
}

/// The whole warp's part of `tile`, rounded to T.
template <class T>
__device__ inline void store_scores(const SharedRows<T>& to, Scores& tile) {
  for_each_pair(tile, [&](int, int row, int column, float value, float next) {
    store_pair(to, warp_row() + row, warp_column(tile_size) + column, value, next);
  });
}

/// The block's 64 x columns results to rows of a gradient, `rows` of them.
template <int columns, class T>
__device__ inline void write_results(Results<columns>& results, T* to, int64_t step, int rows, int channels) {
  for_each_pair(results, [&](int, int row, int column, float value, float next) {
    if (warp_row() + row >= rows) return;
    store_pair(to + (warp_row() + row) * step, warp_column(columns) + column, channels, value, next);
  });
}

template <class T>
constexpr int64_t backward_bytes(int columns) {
  return 4 * tile_bytes<T>(columns) + tile_bytes<T>(tile_size) + QueryTile::bytes;
}

/// A block owns 64 queries of a head, and a slice of their grad_q. Shared: QueryTile; q, grad_y, k and v (64 x columns each);
/// dS (64 x 64).
template <class T, int columns>
__global__ void __launch_bounds__(backward_block)
    query_gradients(BackwardInputs<T> in, T* grad_q, Sizes sizes) {
  SharedMemory shared;
  const QueryTile queries(shared);
  const ScoreTiles<T, columns> tiles(shared);
  const SharedRows<T> weights = shared_tile<T, tile_size>(shared);
  const Place place(sizes, sizes.n_heads, sizes.query_tiles(), columns);
  const int group = place.h / sizes.heads_per_group(), channels = slice_channels(sizes, place.p0, columns);
  const int64_t t0 = place.tile * tile_size, query_offset = sizes.query_at(place.b, t0, place.h);
  const int64_t last_query = t0 + tile_size < sizes.n_queries ? t0 + tile_size - 1 : sizes.n_queries - 1;
  const int64_t last_key = sizes.n_keys - sizes.n_queries + last_query;
  const HeadRows<T> q(in.forward.q, query_offset, sizes.query_step(), sizes.n_queries - t0);
  const HeadRows<T> grad_y(in.grad_y, query_offset, sizes.query_step(), sizes.n_queries - t0);

  queries.load(in, sizes, place.b, place.h, t0);
  Results<columns> sums;
  sums.clear();
  const int64_t first_tile = Visible(sizes, in.forward.positions, place.b, t0).first / tile_size * tile_size;
  for (int64_t s0 = first_tile; s0 <= last_key; s0 += tile_size) {
    const int64_t key_offset = sizes.key_at(place.b, s0, group);
    Scores scores, grads;
    tiles.multiply_rows(q, grad_y, HeadRows<T>(in.forward.k, key_offset, sizes.key_step(), sizes.n_keys - s0),
                        HeadRows<T>(in.forward.v, key_offset, sizes.key_step(), sizes.n_keys - s0),
                        s0 == first_tile, place.p0, sizes, scores, grads);
#pragma unroll
    for (int n = 0; n < tile_size / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        queries.weigh(warp_row() + fragment_row(i), s0 + warp_column(tile_size) + 8 * n + fragment_column(i),
                      sizes.scale, scores.fragments[0][n].values[i], grads.fragments[0][n].values[i]);
      }
    }
    store_scores(weights, grads);
    sync_block();
    add_results<columns>(sums, weights, tiles.b, channels);
    sync_block();
  }
  write_results<columns>(sums, grad_q + query_offset + place.p0, sizes.query_step(), q.rows, channels);
}

/// A block owns 64 keys of a group, and a slice of their grad_k and grad_v, which it sums over the group's heads and their
/// tiles of queries in order. Shared: as above, the 64 x 64 being first P, then dS, both transposed.
template <class T, int columns>
__global__ void __launch_bounds__(backward_block, sizeof(T) == sizeof(float) ? 1 : 2)
    key_gradients(BackwardInputs<T> in, T* grad_k, T* grad_v, Sizes sizes) {
  SharedMemory shared;
  const QueryTile queries(shared);
  const ScoreTiles<T, columns> tiles(shared);
  const SharedRows<T> weights = shared_tile<T, tile_size>(shared);
  const Place place(sizes, sizes.n_kv_heads, sizes.key_tiles(), columns);
  const int channels = slice_channels(sizes, place.p0, columns);
  const int64_t s0 = place.tile * tile_size, key_offset = sizes.key_at(place.b, s0, place.h);
  const int64_t first_query = s0 - (sizes.n_keys - sizes.n_queries);  // that sees the tile
  const HeadRows<T> k(in.forward.k, key_offset, sizes.key_step(), sizes.n_keys - s0);
  const HeadRows<T> v(in.forward.v, key_offset, sizes.key_step(), sizes.n_keys - s0);

  Results<columns> k_sums, v_sums;
  k_sums.clear();
  v_sums.clear();
  bool is_first = true;
  for (int h = place.h * sizes.heads_per_group(); h < (place.h + 1) * sizes.heads_per_group(); ++h) {
    for (int64_t t0 = first_query > 0 ? first_query / tile_size * tile_size : 0; t0 < sizes.n_queries;
         t0 += tile_size) {
      // What a query does not reach back to, none after it does.
      if (Visible(sizes, in.forward.positions, place.b, t0).first >= s0 + tile_size) break;
      const int64_t query_offset = sizes.query_at(place.b, t0, h);
      const HeadRows<T> q(in.forward.q, query_offset, sizes.query_step(), sizes.n_queries - t0);
      const HeadRows<T> grad_y(in.grad_y, query_offset, sizes.query_step(), sizes.n_queries - t0);
      Scores scores, grads;
      queries.load(in, sizes, place.b, h, t0);
      tiles.multiply_rows(k, v, q, grad_y, is_first, place.p0, sizes, scores, grads);
      is_first = false;
#pragma unroll
      for (int n = 0; n < tile_size / 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          queries.weigh(warp_column(tile_size) + 8 * n + fragment_column(i),
                        s0 + warp_row() + fragment_row(i), sizes.scale, scores.fragments[0][n].values[i],
                        grads.fragments[0][n].values[i]);
        }
      }
      store_scores(weights, scores);
      sync_block();
      add_results<columns>(v_sums, weights, tiles.grad_b, channels);
      sync_block();
      store_scores(weights, grads);
      sync_block();
      add_results<columns>(k_sums, weights, tiles.b, channels);
      sync_block();
    }
  }
  write_results<columns>(k_sums, grad_k + key_offset + place.p0, sizes.key_step(), k.rows, channels);
  write_results<columns>(v_sums, grad_v + key_offset + place.p0, sizes.key_step(), k.rows, channels);
}

// ---- launches

Sizes sizes_of(const AttentionForwardArgs& args, int columns) {
  const int head_dim = static_cast<int>(args.q.dim(3));
  return {args.q.dim(0),
          args.q.dim(1),
          args.k.dim(1),
          args.window,
          static_cast<int>(args.q.dim(2)),
          static_cast<int>(args.k.dim(2)),
          head_dim,
          (head_dim + columns - 1) / columns,
          static_cast<float>(args.scale)};
}

template <class T>
Inputs<T> inputs_of(const AttentionForwardArgs& args) {
  return {args.q.data<T>(), args.k.data<T>(), args.v.data<T>(), args.positions.data<int32_t>()};
}

template <class T, int columns>
void launch_forward(const AttentionForwardArgs& args) {
  const Sizes sizes = sizes_of(args, columns);
  launch("attention_forward", forward<T, columns>,
         {.grid = {sizes.batch * sizes.n_heads * sizes.query_tiles() * sizes.n_slices},
          .block = forward_block,
          .shared_bytes = forward_bytes<T>(columns)},
         inputs_of<T>(args), args.y.data<T>(), args.log_sums.data<float>(), sizes);
}

template <class T, int columns>
void launch_backward(const AttentionBackwardArgs& args) {
  const Sizes sizes = sizes_of(args.forward, columns);
  const Tensor delta = empty_like(args.forward.log_sums);
  launch("attention_row_deltas", row_deltas<T>,
         {.grid = {blocks_for(delta.numel(), backward_block / warp_size)}, .block = backward_block},
         args.forward.y.data<T>(), args.grad_y.data<T>(), delta.data<float>(), sizes);
  const BackwardInputs<T> in{inputs_of<T>(args.forward), args.grad_y.data<T>(),
                             args.forward.log_sums.data<float>(), delta.data<float>()};
  launch("attention_query_gradients", query_gradients<T, columns>,
         {.grid = {sizes.batch * sizes.n_heads * sizes.query_tiles() * sizes.n_slices},
          .block = backward_block,
          .shared_bytes = backward_bytes<T>(columns)},
         in, args.grad_q.data<T>(), sizes);
  launch("attention_key_gradients", key_gradients<T, columns>,
         {.grid = {sizes.batch * sizes.n_kv_heads * sizes.key_tiles() * sizes.n_slices},
          .block = backward_block,
          .shared_bytes = backward_bytes<T>(columns)},
         in, args.grad_k.data<T>(), args.grad_v.data<T>(), sizes);
}

/// Calls `body` with an element of the dtype and the width of slices, as std::integral_constant: 128 channels where they
/// are bf16 and as many, which f32's shared memory would not hold.
template <class Body>
void dispatch_columns(const AttentionForwardArgs& args, const Body& body) {
  dispatch_cuda(args.q.dtype(), "attention", [&](auto element) {
    if constexpr (sizeof(element) == 2) {
      if (args.q.dim(3) > tile_size) {
        body(element, std::integral_constant<int, 2 * tile_size>());
        return;
      }
    }
    body(element, std::integral_constant<int, tile_size>());
  });
}

}  // namespace

void attention_forward_cuda(const AttentionForwardArgs& args) {
  dispatch_columns(args,
                   [&](auto element, auto columns) { launch_forward<decltype(element), columns>(args); });
}

void attention_backward_cuda(const AttentionBackwardArgs& args) {
  dispatch_columns(args.forward,
                   [&](auto element, auto columns) { launch_backward<decltype(element), columns>(args); });
}

}  // namespace headwater
