// Private to the operator's CUDA kernels: sizes and places, tiles of 64 x 64 in the registers of a block, and how rows
// come into shared memory.
//
// Indices: b sequence, c chunk, t step, i and j steps within a chunk, h head, n key channel, p value channel.
#pragma once

#include <cstdint>
#include <optional>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "core/cuda/matrix_unit.h"
#include "ops/chunked_matrix_state/chunked_matrix_state_kernels.h"

namespace headwater::matrix_state {

/// The side of a tile: the most steps in a chunk, and the most channels that are worked on at a time.
inline constexpr int tile_size = 64;
/// Threads of every kernel with matrix products: 8 warps, each with 16 x 32 of a tile.
inline constexpr int tile_block = 256;

/// Depths and widths of products are multiples of 16; what is beyond the data is zero.
HEADWATER_HOST_DEVICE constexpr int padded(int size) {
  return (size + 15) / 16 * 16;
}

/// Rows of shared memory are 16 bytes longer than their data (core/cuda/matrix_unit.h).
template <class T>
HEADWATER_HOST_DEVICE constexpr int row_step(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

/// What shared_rows takes.
constexpr int64_t rows_bytes(int64_t rows, int64_t columns, int element_bytes) {
  return rows * (columns * element_bytes + 16);
}

/// What every kernel knows.
struct Sizes {
  int64_t batch, length, n_chunks;
  int n_groups, n_heads, d_key, d_value;
  int chunk_len;  // at most tile_size
  int rows;       // padded(chunk_len)
  int key_slice;  // key channels of a state that are in shared memory at a time; a multiple of 16

  HEADWATER_HOST_DEVICE int heads_per_group() const { return n_heads / n_groups; }
  HEADWATER_HOST_DEVICE int n_value_slices() const { return (d_value + tile_size - 1) / tile_size; }
  HEADWATER_HOST_DEVICE int n_key_slices() const { return (d_key + tile_size - 1) / tile_size; }
  HEADWATER_HOST_DEVICE int64_t begin(int64_t chunk) const { return chunk * chunk_len; }
  HEADWATER_HOST_DEVICE int columns_from(int p0) const {  // value channels of the slice that begins with p0
    return d_value - p0 < tile_size ? d_value - p0 : tile_size;
  }
  HEADWATER_HOST_DEVICE int n_steps(int64_t chunk) const {
    const int64_t rest = length - begin(chunk);
    return rest < chunk_len ? static_cast<int>(rest) : chunk_len;
  }
  // Where things begin.
  HEADWATER_HOST_DEVICE int64_t key_at(int64_t b, int64_t t, int group) const {
    return ((b * length + t) * n_groups + group) * d_key;
  }
  HEADWATER_HOST_DEVICE int64_t value_at(int64_t b, int64_t t, int h) const {
    return ((b * length + t) * n_heads + h) * d_value;
  }
  HEADWATER_HOST_DEVICE int64_t step_at(int64_t b, int64_t t, int h) const {
    return (b * length + t) * n_heads + h;
  }
  HEADWATER_HOST_DEVICE int64_t head_chunk(int64_t b, int h, int64_t chunk) const {
    return (b * n_heads + h) * n_chunks + chunk;
  }
  HEADWATER_HOST_DEVICE int64_t state_size() const { return static_cast<int64_t>(d_key) * d_value; }
  HEADWATER_HOST_DEVICE int64_t key_step() const { return static_cast<int64_t>(n_groups) * d_key; }
  HEADWATER_HOST_DEVICE int64_t value_step() const { return static_cast<int64_t>(n_heads) * d_value; }
};

/// A block's piece of work: grids are one long axis, its pieces ordered so that neighbours read the same memory.
struct Place {
  int64_t b, chunk;
  int group, part, slice;

  /// Of the blocks of a grid of batch * n_chunks * n_groups * n_parts * n_slices.
  __device__ Place(const Sizes& sizes, int n_parts, int n_slices) {
    int64_t rest = blockIdx.x;
    slice = static_cast<int>(rest % n_slices);
    rest /= n_slices;
    part = static_cast<int>(rest % n_parts);
    rest /= n_parts;
    group = static_cast<int>(rest % sizes.n_groups);
    rest /= sizes.n_groups;
    chunk = rest % sizes.n_chunks;
    b = rest / sizes.n_chunks;
  }
};

/// The heads of a group, shared out to n_parts blocks, in order.
struct HeadParts {
  int heads_per_part, n_parts;

  __device__ int first(const Sizes& sizes, const Place& place) const {
    return place.group * sizes.heads_per_group() + place.part * heads_per_part;
  }
  __device__ int last(const Sizes& sizes, const Place& place) const {  // the first that is no longer its own
    const int end = first(sizes, place) + heads_per_part,
              group_end = (place.group + 1) * sizes.heads_per_group();
    return end < group_end ? end : group_end;
  }
};

/// Enough parts that the grid fills the largest GPUs a few times over, if there are as many heads. Of the shape alone:
/// where heads are summed over, the parts decide the order.
inline HeadParts head_parts(const Sizes& sizes, int64_t n_slices) {
  constexpr int64_t wanted_blocks = 1024;
  const int64_t blocks = sizes.batch * sizes.n_chunks * sizes.n_groups * n_slices;
  const int heads = sizes.heads_per_group();
  const int64_t wanted = (wanted_blocks + blocks - 1) / (blocks > 0 ? blocks : 1);
  const int n_parts = static_cast<int>(wanted < 1 ? 1 : wanted < heads ? wanted : heads);
  const int heads_per_part = (heads + n_parts - 1) / n_parts;
  return {heads_per_part, (heads + heads_per_part - 1) / heads_per_part};
}

// ---- decays

/// What the kernel chunk_decays leaves, and all others read.
struct Decays {
  enum Row { high, low, from_start, to_end, n_rows };
  const float* rows;        // (batch, n_heads, n_chunks, n_rows, tile_size): B as high + low, e, f
  const float* through;     // (batch, n_heads, n_chunks)
  const int32_t* segments;  // (batch, n_chunks, tile_size): the first step of the chunk that each step sees
};

inline constexpr int decay_rows_size = Decays::n_rows * tile_size;
static_assert(decay_rows_size == tile_block, "a thread loads one number");

/// One head's decays within one chunk, in shared memory.
struct ChunkDecays {
  SharedArray<float> rows;   // as Decays::rows
  SharedArray<float> scale;  // value_scale, 1 without; 0 beyond the chunk's steps
  SharedArray<int32_t> segments;

  __device__ explicit ChunkDecays(SharedMemory& shared)
      : rows(shared.array<float>(decay_rows_size)),
        scale(shared.array<float>(tile_size)),
        segments(shared.array<int32_t>(tile_size)) {}
  static constexpr int64_t bytes =
      shared_bytes<float>(decay_rows_size + tile_size) + shared_bytes<int32_t>(tile_size);

  /// Whole block. Visible after sync_block().
  __device__ void load(const Sizes& sizes, const Decays& decays, const float* value_scale, const Place& place,
                       int h) const {
    const int i = static_cast<int>(threadIdx.x);
    rows[i] = decays.rows[sizes.head_chunk(place.b, h, place.chunk) * decay_rows_size + i];
    if (i >= tile_size) return;
    segments[i] = decays.segments[(place.b * sizes.n_chunks + place.chunk) * tile_size + i];
    const bool inside = i < sizes.n_steps(place.chunk);
    const int64_t step = sizes.step_at(place.b, sizes.begin(place.chunk) + i, h);
    scale[i] = !inside ? 0.0f : value_scale != nullptr ? value_scale[step] : 1.0f;
  }

  /// L[i][j] = exp(B[i] - B[j]) where j is seen from i, else 0: masked first, since beyond the diagonal it overflows.
  __device__ float between(int i, int j) const {
    if (j > i || j < segments[i]) return 0.0f;
    return expf((rows[Decays::high * tile_size + i] - rows[Decays::high * tile_size + j]) +
                (rows[Decays::low * tile_size + i] - rows[Decays::low * tile_size + j]));
  }
  __device__ float from_start(int i) const { return rows[Decays::from_start * tile_size + i]; }
  __device__ float to_end(int i) const { return rows[Decays::to_end * tile_size + i]; }
};

// ---- tiles

/// A matrix of up to 64 columns in shared memory. Its rows are as far apart as if it had all 64, and unless told otherwise
/// it has 64: places that are known when compiling cost no registers. So kernels take arrays of fixed size first.
template <class T>
struct TileRows : SharedRows<T> {
  __device__ explicit TileRows(SharedMemory& shared, int n_rows = tile_size)
      : SharedRows<T>{shared.array<T>(n_rows * row_step<T>(tile_size)), 0, row_step<T>(tile_size)} {}
};
constexpr int64_t tile_rows_bytes(int element_bytes, int n_rows = tile_size) {
  return rows_bytes(n_rows, tile_size, element_bytes);
}

/// Rows, columns and depth of a product, multiples of 16 up to 64 (the depth may be any multiple).
struct Extent {
  int rows, columns, depth;
};

/// Where a product's matrices are zero, or not wanted: these parts are not computed.
enum class Zeros { none, result_upper, left_upper, left_lower };

/// 64 x 64 sums in the registers of the block: warp w has rows 16 (w % 4) ... and columns 32 (w / 4) ...
struct Tile {
  WarpTile<1, 4> sums;

  __device__ static int first_row() { return 16 * (warp_index() % 4); }
  __device__ static int first_column() { return 32 * (warp_index() / 4); }

  /// += A B. `left_upper`: A is zero above its diagonal; `left_lower`: below. `result_upper`: only what lies on or below
  /// the diagonal is wanted.
  template <class MatrixA, class MatrixB>
  __device__ void add_product(const MatrixA& a, const MatrixB& b, const Extent& extent,
                              Zeros zeros = Zeros::none) {
    const int row = first_row(), column = first_column();
    int columns = extent.columns - column, begin = 0, end = extent.depth;
    if (zeros == Zeros::result_upper && row + 16 - column < columns) columns = row + 16 - column;
    if (zeros == Zeros::left_upper && row + 16 < end) end = row + 16;
    if (zeros == Zeros::left_lower) begin = row;
    if (row >= extent.rows || columns <= 0) return;
    sums.add_product(a.at(row, begin), b.at(begin, column), end - begin, columns);
  }

  /// body(row, column, value&) for each value that the thread holds, 16 in all.
  template <class Body>
  __device__ void for_each(const Body& body) {
    const int row = first_row(), column = first_column();
    sums.for_each([&](int i, int j, float& value) { body(row + i, column + j, value); });
  }
  /// body(half, row, column, value, next): two neighbours in a row at a time. The thread's values lie in two rows; `half`,
  /// known when compiling, says in which.
  template <class Body>
  __device__ void for_each_pair(const Body& body) {
    const int row = first_row(), column = first_column();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float(&values)[4] = sums.fragments[0][n].values;
        body(half, row + fragment_row(2 * half), column + 8 * n + fragment_column(0), values[2 * half],
             values[2 * half + 1]);
      }
    }
  }
};

/// tile += factor(row, column) product.
template <class Factor>
__device__ inline void add_scaled(Tile& tile, Tile& product, const Factor& factor) {
  const int row = Tile::first_row(), column = Tile::first_column();
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tile.sums.fragments[0][n].values[i] +=
          factor(row + fragment_row(i), column + 8 * n + fragment_column(i)) *
          product.sums.fragments[0][n].values[i];
    }
  }
}

/// Where a tile's rows go in global memory: row i at data + i * step, `columns` elements.
template <class T>
struct TargetRows {
  T* data;
  int64_t step;
  int columns;
  bool in_pairs;  // whether two neighbours can be written at once

  __device__ TargetRows(T* first, int64_t row_distance, int n_columns)
      : data(first),
        step(row_distance),
        columns(n_columns),
        in_pairs(n_columns % 2 == 0 && row_distance % 2 == 0 &&
                 reinterpret_cast<uintptr_t>(first) % (2 * sizeof(T)) == 0) {}

  /// `column` is even and less than `columns`.
  __device__ void store(int row, int column, float value, float next) const {
    T* to = data + row * step + column;
    if (in_pairs) {
      store_packed(to, Packed<T, 2>{from_float<T>(value), from_float<T>(next)});
    } else {
      to[0] = from_float<T>(value);
      if (column + 1 < columns) to[1] = from_float<T>(next);
    }
  }
};

// ---- from global to shared memory, by the whole block

template <class T>
__device__ inline SharedRows<T> shared_rows(SharedMemory& shared, int rows, int columns) {
  return {shared.array<T>(rows * row_step<T>(columns)), 0, row_step<T>(columns)};
}

/// Rows of a global matrix: `rows` x `columns`, `step` apart.
template <class T>
struct GlobalRows {
  const T* data;
  int64_t step;
  int rows, columns;

  /// Whether its rows can be read 16 bytes at a time.
  __device__ bool is_packed() const {
    constexpr int width = 16 / static_cast<int>(sizeof(T));
    return columns % width == 0 && step % width == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

/// to = from, zeros up to padded(columns) and `rows`. Visible after finish_copies().
template <class T>
__device__ inline void copy_rows(const SharedRows<T>& to, const GlobalRows<T>& from, int rows) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const int columns = padded(from.columns), packs = columns / width;
  if (from.is_packed()) {
#pragma unroll 1
    for (int item = static_cast<int>(threadIdx.x); item < rows * packs; item += tile_block) {
      const int row = item / packs, column = item % packs * width, index = row * to.row_step + column;
      if (row < from.rows && column < from.columns) {
        copy_async(to.data, to.offset + index, from.data + row * from.step + column);
      } else {
        to.data.template store<width>(to.offset + index, Packed<T, width>{});
      }
    }
    return;
  }
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < rows * columns; item += tile_block) {
    const int row = item / columns, column = item % columns;
    const bool inside = row < from.rows && column < from.columns;
    to.set(row, column, inside ? from.data[row * from.step + column] : T{});
  }
}

/// The same with row i times factors[i].
template <class T>
__device__ inline void copy_scaled_rows(const SharedRows<T>& to, const GlobalRows<T>& from, int rows,
                                        const SharedArray<float>& factors) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const int columns = padded(from.columns), packs = columns / width;
  const bool packed = from.is_packed();
  for (int item = static_cast<int>(threadIdx.x); item < rows * packs; item += tile_block) {
    const int row = item / packs, column = item % packs * width;
    Packed<T, width> pack{};
    if (row < from.rows && column < from.columns) {
      const T* data = from.data + row * from.step + column;
      if (packed) {
        pack = load_packed<width>(data);
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i) pack.values[i] = column + i < from.columns ? data[i] : T{};
      }
      const float factor = factors[row];
#pragma unroll
      for (int i = 0; i < width; ++i) pack.values[i] = from_float<T>(factor * to_float(pack.values[i]));
    }
    to.data.template store<width>(to.offset + row * to.row_step + column, pack);
  }
}

__device__ inline void finish_copies() {
  commit_copies();
  wait_copies<0>();
  sync_block();
}

// ---- a chunk's products with q and k, which may be wider than what is in shared memory at a time

/// Rows n0 ... n0 + key_slice of a state, whose rows begin at from + n * d_value.
template <class T>
__device__ inline void copy_state(const TileRows<T>& state, const T* from, int n0, int p_columns,
                                  const Sizes& sizes) {
  const int n_rows = sizes.d_key - n0 < sizes.key_slice ? sizes.d_key - n0 : sizes.key_slice;
  copy_rows(state, {from + static_cast<int64_t>(n0) * sizes.d_value, sizes.d_value, n_rows, p_columns},
            padded(n_rows));
}

/// The depth of the product with slice n0.
__device__ inline int slice_depth(const Sizes& sizes, int n0) {
  return padded(sizes.d_key - n0 < sizes.key_slice ? sizes.d_key - n0 : sizes.key_slice);
}

/// scores = q k^T on and below the diagonal; `keys` is shared memory for a slice of k. Waits for q, if that is on its
/// way, and leaves `keys` free.
template <class T>
__device__ inline void compute_scores(Tile& scores, const SharedRows<T>& queries, const TileRows<T>& keys,
                                      const T* k, int n_steps, const Sizes& sizes) {
  const int rows = padded(n_steps);
  scores.sums.clear();
  for (int n0 = 0; n0 < sizes.d_key; n0 += tile_size) {
    const int n_columns = sizes.d_key - n0 < tile_size ? sizes.d_key - n0 : tile_size;
    copy_rows(keys, {k + n0, sizes.key_step(), n_steps, n_columns}, rows);
    finish_copies();
    scores.add_product(queries.at(0, n0), keys.transposed(), {rows, rows, padded(n_columns)},
                       Zeros::result_upper);
    sync_block();
  }
}

/// result = left S; slice 0 of S is on its way into `state`.
template <class T>
__device__ inline void compute_state_product(Tile& result, const SharedRows<T>& left,
                                             const TileRows<T>& state, const T* from, int rows, int p_columns,
                                             const Sizes& sizes) {
  result.sums.clear();
  for (int n0 = 0; n0 < sizes.d_key; n0 += sizes.key_slice) {
    if (n0 > 0) {
      sync_block();
      copy_state(state, from, n0, p_columns, sizes);
    }
    finish_copies();
    result.add_product(left.at(0, n0), state, {rows, padded(p_columns), slice_depth(sizes, n0)});
  }
}

// ---- the steps that forward and backward share (matrix_state_passing_cuda.cu)

/// The largest tiles with which a block's shared memory, by `needed_bytes`, fits; none if even
/// the smallest does not.
std::optional<Sizes> plan_sizes(const MatrixStateForwardArgs& args,
                                int64_t (*needed_bytes)(const Sizes&, int element_bytes));

/// The tensors behind Decays.
struct DecayTensors {
  Tensor rows, through, segments;
  Decays pointers() const { return {rows.data<float>(), through.data<float>(), segments.data<int32_t>()}; }
};

/// The decays of every head and chunk.
DecayTensors chunk_decays(const MatrixStateForwardArgs& args, const Sizes& sizes);

/// What each chunk adds to the state that goes through it, f32 (batch, n_heads, n_chunks, d_key, d_value): forwards
/// sum_j k[j] (f[j] u[j])^T, and in the backward sum_i q[i] (e[i] g[i])^T.
Tensor chunk_states(const Tensor& keys, const Tensor& values, const Tensor& value_scale,
                    const DecayTensors& decays, Decays::Row factors, const Sizes& sizes);

/// S <- through S + own state, chunk by chunk, from `first` (zeros if undefined). Gives the S before each step, in
/// `dtype`, shaped like `own`, whose memory it may take; the last S goes to `last`, if defined. `reverse` walks from the
/// last chunk to the first.
Tensor pass_states(const Tensor& own, const DecayTensors& decays, const Tensor& first, const Tensor& last,
                   DType dtype, bool reverse, const Sizes& sizes);

}  // namespace headwater::matrix_state
