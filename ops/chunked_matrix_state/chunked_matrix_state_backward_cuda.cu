// The chunked form, backward. The states that enter chunks are computed again; the same two steps in reverse, with
// (e q)^T g in place of (f k)^T u, give the gradients dS' of the states that leave chunks. Then two kernels, each over
// all chunks at once: one for what belongs to a head (values, scales, decays, skip), one for what a group's heads share
// (queries and keys). Both need g u^T, the only product that is computed twice; in return each has room on chip for the
// sums that it keeps, with states and channels of any width.
//
// Letters as in chunked_matrix_state_cpu.cpp.

#include <algorithm>

#include "ops/chunked_matrix_state/matrix_state_tiles.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"

namespace headwater {
namespace matrix_state {
namespace {

template <class T>
struct BackwardInputs {
  const T *q, *k;            // (batch, length, n_groups, d_key)
  const T *v, *grad_y;       // (batch, length, n_heads, d_value)
  const float* value_scale;  // (batch, length, n_heads) or nullptr
  const float* skip;         // nullptr: none
  bool skip_per_channel;     // (n_heads, d_value), else (n_heads)
  Decays decays;
  const T *states,
      *grad_states;  // S entering and dS' leaving each chunk: (batch, n_heads, n_chunks, d_key, d_value)
};

// ---- what belongs to a head

/// Every pointer but grad_v is null where its gradient is not wanted. Partials have a row for each chunk of each sequence.
template <class T>
struct ValueGradients {
  T* grad_v;                // (batch, length, n_heads, d_value)
  float* grad_value_scale;  // (batch, length, n_heads)
  float* grad_log_decay;    // (batch, length, n_heads)
  float* decay_partials;    // (batch * n_chunks, n_heads)
  float* skip_partials;     // (batch * n_chunks, n_heads, d_value), or without d_value
};

/// Small sums in shared memory, by the names of what they hold.
struct ValueSums {
  // Sums over channels, (2 halves of a tile's columns, steps):
  SharedArray<float> queries;     // e[i] q[i].(S g[i])
  SharedArray<float> keys;        // f[i] u[i].(dS'^T k[i])
  SharedArray<float> scales;      // v[i].grad_u[i]
  SharedArray<float> left_rows;   // sums over the left half of each row
  SharedArray<float> columns;     // (4 warps that share columns, steps)
  SharedArray<float> skip_parts;  // g v summed over a quarter of the steps: (4, channels)
  SharedArray<float> skip;        // (channels)
  SharedArray<float> inner;       // <S, dS'>: (warps)

  __device__ explicit ValueSums(SharedMemory& shared)
      : queries(shared.array<float>(2 * tile_size)),
        keys(shared.array<float>(2 * tile_size)),
        scales(shared.array<float>(2 * tile_size)),
        left_rows(shared.array<float>(tile_size)),
        columns(shared.array<float>(4 * tile_size)),
        skip_parts(shared.array<float>(4 * tile_size)),
        skip(shared.array<float>(tile_size)),
        inner(shared.array<float>(tile_block / warp_size)) {}
  static constexpr int64_t bytes = shared_bytes<float>(16 * tile_size + tile_block / warp_size);
};

/// q k^T of a chunk, on and below the diagonal, where a thread finds again what it put there: 10 blocks of 16 x 16. In
/// registers it would take 16 of each thread's for all the time that a group's heads take.
struct SavedScores {
  SharedArray<float> values;

  __device__ explicit SavedScores(SharedMemory& shared) : values(shared.array<float>(size)) {}
  static constexpr int size = 10 * 256;

  /// body(index, n): values[index ...] are of fragment n. Fragments beyond the diagonal have none.
  template <class Body>
  __device__ void for_each_fragment(const Body& body) const {
    const int row = Tile::first_row() / 16, column = Tile::first_column() / 16;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (column + n / 2 > row) continue;
      body((row * (row + 1) / 2 + column + n / 2) * 256 + lane_index() * 8 + n % 2 * 4, n);
    }
  }
  __device__ void put(const Tile& scores) const {
    for_each_fragment([&](int index, int n) {
      const float(&from)[4] = scores.sums.fragments[0][n].values;
      values.store<4>(index, Packed<float, 4>{from[0], from[1], from[2], from[3]});
    });
  }
  /// weights = scores o L.
  template <class T>
  __device__ void weigh(const ChunkDecays& decays, int rows, const SharedRows<T>& weights) const {
    const int first_row = Tile::first_row() + fragment_row(0),
              first_column = Tile::first_column() + fragment_column(0);
    if (first_row >= rows) return;
    for_each_fragment([&](int index, int n) {
      const Packed<float, 4> scores = values.load<4>(index);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = first_row + k / 2 * 8, j = first_column + 8 * n + k % 2;
        weights.set(i, j, from_float<T>(scores.values[k] * decays.between(i, j)));
      }
    });
  }
};

int64_t values_bytes(const Sizes& sizes, int element_bytes) {
  return ChunkDecays::bytes + ValueSums::bytes + shared_bytes<float>(SavedScores::size) +
         3 * tile_rows_bytes(element_bytes) + 2 * tile_rows_bytes(element_bytes, sizes.key_slice) +
         2 * rows_bytes(sizes.rows, padded(sizes.d_key), element_bytes);
}

/// The sum over the four lanes that hold parts of the same rows.
__device__ inline float row_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

/// Each row's values become the sums of those to their left: inclusive of nothing. Two halves of the tile's columns are in
/// different warps; the left ones hand their sums over.
__device__ inline void sum_rows_before(Tile& tile, const SharedArray<float>& left_rows) {
  const int t = lane_index() % 4;
  float running[2] = {0.0f, 0.0f};
  tile.for_each_pair([&](int half, int, int, float& value, float& next) {
    float through = value + next;
    const float one = shuffle_up(through, 1);
    if (t >= 1) through += one;
    const float two = shuffle_up(through, 2);
    if (t >= 2) through += two;
    const float before = shuffle_up(through, 1);
    const float sum = running[half] + (t >= 1 ? before : 0.0f);
    next = sum + value;
    value = sum;
    running[half] += shuffle(through, lane_index() | 3);
  });
  const int row = Tile::first_row() + fragment_row(0);
  if (Tile::first_column() == 0 && t == 0) {
    left_rows[row] = running[0];
    left_rows[row + 8] = running[1];
  }
  sync_block();
  if (Tile::first_column() == 0) return;
  const float left[2] = {left_rows[row], left_rows[row + 8]};
  tile.for_each_pair([&](int half, int, int, float& value, float& next) {
    value += left[half];
    next += left[half];
  });
}

/// columns[w][j] (+)= the sum over the rows i >= j of warp w's 16; whole block.
__device__ inline void sum_columns_below(const Tile& tile, const SharedArray<float>& columns,
                                         bool accumulate) {
  const int row = Tile::first_row() + fragment_row(0), column = Tile::first_column() + fragment_column(0);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = column + 8 * n + i;
      float sum = row >= j ? tile.sums.fragments[0][n].values[i] : 0.0f;
      sum += row + 8 >= j ? tile.sums.fragments[0][n].values[2 + i] : 0.0f;
      for (int mask = 4; mask < warp_size; mask *= 2) sum += shuffle_xor(sum, mask);
      const int index = Tile::first_row() / 16 * tile_size + j;
      if (lane_index() < 4) columns[index] = accumulate ? columns[index] + sum : sum;
    }
  }
}

/// target (2 halves of the tile's columns, steps) (+)= a number of each of the thread's two rows, summed along the rows.
__device__ inline void deliver(const float (&of_rows)[2], const SharedArray<float>& target, bool accumulate) {
  const int index = Tile::first_column() / 32 * tile_size + Tile::first_row() + fragment_row(0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = row_sum(of_rows[half]);
    const int at = index + 8 * half;
    if (lane_index() % 4 == 0) target[at] = accumulate ? target[at] + sum : sum;
  }
}

/// inner[warp] (+)= the warp's part of <S, dS'> of a slice in shared memory.
template <class T>
__device__ void sum_inner(const SharedRows<T>& a, const SharedRows<T>& b, int rows, int columns,
                          const SharedArray<float>& inner, bool accumulate) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const int packs = columns / width;
  float sum = 0.0f;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < rows * packs; item += tile_block) {
    const int index = item / packs * a.row_step + item % packs * width;
    const Packed<T, width> x = a.data.template load<width>(index), y = b.data.template load<width>(index);
#pragma unroll
    for (int i = 0; i < width; ++i) sum += to_float(x.values[i]) * to_float(y.values[i]);
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) inner[warp_index()] = accumulate ? inner[warp_index()] + sum : sum;
}

/// A block of `value_gradients`: what it works on, its shared memory, and the steps of its work.
template <class T>
struct ValuePass {
  const BackwardInputs<T>& in;
  const ValueGradients<T>& out;
  const Sizes& sizes;
  const Place& place;
  const int n_steps, rows;
  const ChunkDecays decays;
  const ValueSums sums;
  const SavedScores scores;
  const TileRows<T> grad_outputs, values;  // (rows, 64)
  const TileRows<T> weights;               // (rows, rows)
  const TileRows<T> state, grad_state;     // slices (key_slice, 64)
  const SharedRows<T> queries, keys;       // (rows, d_key)

  __device__ ValuePass(SharedMemory& shared, const BackwardInputs<T>& inputs,
                       const ValueGradients<T>& outputs, const Sizes& all_sizes, const Place& own_place)
      : in(inputs),
        out(outputs),
        sizes(all_sizes),
        place(own_place),
        n_steps(sizes.n_steps(place.chunk)),
        rows(padded(n_steps)),
        decays(shared),
        sums(shared),
        scores(shared),
        grad_outputs(shared),
        values(shared),
        weights(shared),
        state(shared, sizes.key_slice),
        grad_state(shared, sizes.key_slice),
        queries(shared_rows<T>(shared, sizes.rows, padded(sizes.d_key))),
        keys(shared_rows<T>(shared, sizes.rows, padded(sizes.d_key))) {}

  __device__ int64_t begin() const { return sizes.begin(place.chunk); }
  /// Of a head in this chunk, in tensors with a row for each chunk of each sequence.
  __device__ int64_t partial_at(int h) const {
    return (place.b * sizes.n_chunks + place.chunk) * sizes.n_heads + h;
  }

  __device__ void compute_scores() const {
    const int64_t offset = sizes.key_at(place.b, begin(), place.group);
    copy_rows(queries, {in.q + offset, sizes.key_step(), n_steps, sizes.d_key}, rows);
    copy_rows(keys, {in.k + offset, sizes.key_step(), n_steps, sizes.d_key}, rows);
    finish_copies();
    Tile tile;
    tile.sums.clear();
    tile.add_product(queries, keys.transposed(), {rows, rows, padded(sizes.d_key)}, Zeros::result_upper);
    scores.put(tile);
  }

  /// Value channels from p0 on, key channels of states from n0 on.
  __device__ void copy_values(int h, int p0) const {
    const int64_t offset = sizes.value_at(place.b, begin(), h) + p0;
    copy_rows(values, {in.v + offset, sizes.value_step(), n_steps, sizes.columns_from(p0)}, rows);
    copy_rows(grad_outputs, {in.grad_y + offset, sizes.value_step(), n_steps, sizes.columns_from(p0)}, rows);
  }
  __device__ void copy_states(int h, int p0, int n0) const {
    const int64_t offset = sizes.head_chunk(place.b, h, place.chunk) * sizes.state_size() + p0;
    copy_state(state, in.states + offset, n0, sizes.columns_from(p0), sizes);
    copy_state(grad_state, in.grad_states + offset, n0, sizes.columns_from(p0), sizes);
  }

  /// sums.columns (+)= of each step i, what these channels give to the sum of T_ts (q k^T)_ts over s < i <= t.
  __device__ void sum_within(int columns, bool accumulate) const {
    Tile product;
    product.sums.clear();
    product.add_product(grad_outputs, values.transposed(), {rows, rows, columns}, Zeros::result_upper);
    product.for_each([&](int i, int j, float& value) {
      value = i < rows && j <= i ? value * to_float(weights.get(i, j)) * decays.scale[j] : 0.0f;
    });
    sum_rows_before(product, sums.left_rows);
    sum_columns_below(product, sums.columns, accumulate);
  }

  /// sums.queries (+)= of each step i of these channels, e[i] g[i].(S^T q[i]).
  __device__ void sum_queries(int n0, const Extent& extent, bool accumulate) const {
    float of_rows[2] = {0.0f, 0.0f};
    Tile product;
    product.sums.clear();
    product.add_product(queries.at(0, n0), state, extent);
    product.for_each_pair([&](int half, int i, int p, float value, float next) {
      if (i >= rows || p >= extent.columns) return;
      const float sum =
          value * to_float(grad_outputs.get(i, p)) + next * to_float(grad_outputs.get(i, p + 1));
      of_rows[half] += decays.from_start(i) * sum;
    });
    deliver(of_rows, sums.queries, accumulate);
  }

  /// From k dS' makes grad_u = f k dS' + W^T g; sums.keys (+)= of each step i, u[i].(f[i] dS'^T k[i]).
  __device__ void compute_grad_values(Tile& grad_values, int columns, bool accumulate) const {
    float of_rows[2] = {0.0f, 0.0f};
    grad_values.for_each_pair([&](int half, int i, int p, float& value, float& next) {
      if (i >= rows || p >= columns) return;
      value *= decays.to_end(i);
      next *= decays.to_end(i);
      const float sum = value * to_float(values.get(i, p)) + next * to_float(values.get(i, p + 1));
      of_rows[half] += decays.scale[i] * sum;
    });
    deliver(of_rows, sums.keys, accumulate);
    grad_values.add_product(weights.transposed(), grad_outputs, {rows, columns, rows}, Zeros::left_lower);
  }

  /// grad_v = value_scale grad_u + skip g; sums.scales (+)= v.grad_u of each step.
  __device__ void write_grad_values(Tile& grad_values, int h, int p0, bool accumulate) const {
    const TargetRows<T> to(out.grad_v + sizes.value_at(place.b, begin(), h) + p0, sizes.value_step(),
                           sizes.columns_from(p0));
    const int skip_at = in.skip_per_channel ? h * sizes.d_value + p0 : h;  // within one step: an int holds it
    float of_rows[2] = {0.0f, 0.0f};
    grad_values.for_each_pair([&](int half, int i, int p, float value, float next) {
      if (i >= n_steps || p >= to.columns) return;
      of_rows[half] += value * to_float(values.get(i, p)) + next * to_float(values.get(i, p + 1));
      value *= decays.scale[i];
      next *= decays.scale[i];
      if (in.skip != nullptr) {
        const int one = in.skip_per_channel ? p : 0,
                  other = in.skip_per_channel && p + 1 < to.columns ? p + 1 : one;
        value += in.skip[skip_at + one] * to_float(grad_outputs.get(i, p));
        next += in.skip[skip_at + other] * to_float(grad_outputs.get(i, p + 1));
      }
      to.store(i, p, value, next);
    });
    deliver(of_rows, sums.scales, accumulate);
  }

  /// sums.skip (+)= g v summed over the chunk's steps, for each channel; a thread has a channel and a quarter of the steps.
  __device__ void sum_skip(int h, int p0, bool accumulate) const {
    const int p = static_cast<int>(threadIdx.x) % tile_size,
              quarter = static_cast<int>(threadIdx.x) / tile_size;
    const int p_columns = sizes.columns_from(p0);
    float sum = 0.0f;
#pragma unroll 1
    for (int i = quarter; i < n_steps && p < p_columns; i += 4) {
      sum += to_float(grad_outputs.get(i, p)) * to_float(values.get(i, p));
    }
    sums.skip_parts[quarter * tile_size + p] = sum;
    sync_block();
    if (quarter > 0) return;
    for (int other = 1; other < 4; ++other) sum += sums.skip_parts[other * tile_size + p];
    if (!in.skip_per_channel) {
      sums.skip[p] = accumulate ? sums.skip[p] + sum : sum;
    } else if (p < p_columns) {
      out.skip_partials[partial_at(h) * sizes.d_value + p0 + p] = sum;
    }
  }

  /// The first warp, two steps a lane, brings together
  ///   grad_log_decay[i] = within[i] + sum_{t >= i} queries[t] + sum_{s < i} keys[s] + through <S, dS'>
  /// as sums over these very ranges, and writes it, grad_value_scale, and the sum of a skip that all channels share.
  __device__ void write_steps(int h) const {
    if (warp_index() != 0) return;
    float inner = 0.0f;
    for (int warp = 0; warp < tile_block / warp_size; ++warp) inner += sums.inner[warp];
    const float through = in.decays.through[sizes.head_chunk(place.b, h, place.chunk)] * inner;
    const int first = 2 * lane_index();
    float of_queries[2], of_keys[2], within[2];
    for (int i = 0; i < 2; ++i) {
      const int step = first + i;
      of_queries[i] = sums.queries[step] + sums.queries[tile_size + step];
      of_keys[i] = sums.keys[step] + sums.keys[tile_size + step];
      within[i] = 0.0f;
      for (int warp = 0; warp < 4; ++warp) within[i] += sums.columns[warp * tile_size + step];
    }
    float queries_from = of_queries[0] + of_queries[1], keys_until = of_keys[0] + of_keys[1];
    for (int delta = 1; delta < warp_size; delta *= 2) {
      const float after = shuffle_down(queries_from, delta), before = shuffle_up(keys_until, delta);
      if (lane_index() + delta < warp_size) queries_from += after;
      if (lane_index() >= delta) keys_until += before;
    }
    const float queries_after = shuffle_down(queries_from, 1), keys_before = shuffle_up(keys_until, 1);
    const float later = lane_index() == warp_size - 1 ? 0.0f : queries_after;
    const float earlier = lane_index() == 0 ? 0.0f : keys_before;
    const float total[2] = {within[0] + (later + of_queries[1] + of_queries[0]) + earlier + through,
                            within[1] + (later + of_queries[1]) + (earlier + of_keys[0]) + through};
    float sum = 0.0f;
    for (int i = 0; i < 2; ++i) {
      const int step = first + i;
      if (step >= n_steps) continue;
      const int64_t at = sizes.step_at(place.b, begin() + step, h);
      if (out.grad_log_decay != nullptr) out.grad_log_decay[at] = total[i];
      if (out.grad_value_scale != nullptr)
        out.grad_value_scale[at] = sums.scales[step] + sums.scales[tile_size + step];
      sum += total[i];
    }
    sum = warp_sum(sum);
    if (out.decay_partials != nullptr && lane_index() == 0) out.decay_partials[partial_at(h)] = sum;
    if (out.skip_partials == nullptr || in.skip_per_channel) return;
    const float skip = warp_sum(sums.skip[lane_index()] + sums.skip[lane_index() + warp_size]);
    if (lane_index() == 0) out.skip_partials[partial_at(h)] = skip;
  }
};

// Two blocks' shared memory fits a multiprocessor from Hopper on; before, asking for two would only spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int bf16_blocks = 1;
#else
constexpr int bf16_blocks = 2;
#endif

/// A block owns a chunk and some heads of a group, one after another; each head's value channels are walked 64 at a time,
/// its key channels key_slice at a time. Every sum of a step that an earlier slice has begun is added to. q k^T, which the
/// heads share, stays on chip. Threads: Tile's; at most two tiles at a time, 32 registers.
/// Shared, with 64 steps, d_key 128, d_value 64, in KiB for bf16 (f32): decays and sums 5.5; q k^T 10; g, v, weights 27
/// (51); slices of S and dS' 36 (68); q, k 34 (66): 112.5 (200.5). Two blocks with bf16, one with f32, fit an H100.
template <class T>
__global__ void __launch_bounds__(tile_block, sizeof(T) == 2 ? bf16_blocks : 1)
    value_gradients(BackwardInputs<T> in, ValueGradients<T> out, Sizes sizes, HeadParts parts) {
  SharedMemory shared;
  const Place place(sizes, parts.n_parts, 1);
  const ValuePass<T> pass(shared, in, out, sizes, place);
  pass.compute_scores();
  for (int h = parts.first(sizes, place); h < parts.last(sizes, place); ++h) {
    for (int p0 = 0; p0 < sizes.d_value; p0 += tile_size) {
      const int columns = padded(sizes.columns_from(p0));
      const bool later = p0 > 0;  // sums have begun
      pass.copy_values(h, p0);
      pass.copy_states(h, p0, 0);
      if (!later) {
        pass.decays.load(sizes, in.decays, in.value_scale, place, h);
        sync_block();
        pass.scores.weigh(pass.decays, pass.rows, pass.weights);
      }
      finish_copies();
      pass.sum_within(columns, later);
      Tile grad_values;
      grad_values.sums.clear();
      for (int n0 = 0; n0 < sizes.d_key; n0 += sizes.key_slice) {
        if (n0 > 0) {
          sync_block();
          pass.copy_states(h, p0, n0);
          finish_copies();
        }
        const Extent extent{pass.rows, columns, slice_depth(sizes, n0)};
        pass.sum_queries(n0, extent, later || n0 > 0);
        grad_values.add_product(pass.keys.at(0, n0), pass.grad_state, extent);
        sum_inner<T>(pass.state, pass.grad_state, extent.depth, columns, pass.sums.inner, later || n0 > 0);
      }
      pass.compute_grad_values(grad_values, columns, later);
      pass.write_grad_values(grad_values, h, p0, later);
      if (out.skip_partials != nullptr) pass.sum_skip(h, p0, later);
      sync_block();
    }
    pass.write_steps(h);
    sync_block();
  }
}

// ---- what the heads of a group share

template <class T>
struct KeyGradients {
  T *grad_q, *grad_k;        // (batch, length, n_groups, d_key); written where there is one part
  float *q_parts, *k_parts;  // (n_parts, batch, length, n_groups, d_key); written where there are several
};

constexpr int64_t keys_bytes(int element_bytes) {
  return ChunkDecays::bytes + 5 * tile_rows_bytes(element_bytes);
}

/// A block of `key_gradients`: what it works on, its shared memory, its sums, and the steps of its work.
template <class T>
struct KeyPass {
  const BackwardInputs<T>& in;
  const Sizes& sizes;
  const Place& place;
  const int n_steps, rows;
  const int n0, n_channels;  // key channels
  const ChunkDecays decays;
  const TileRows<T> grad_outputs, values;  // (rows, 64)
  const TileRows<T> grad_weights;          // (rows, rows)
  const TileRows<T> state, grad_state;     // (64, 64); in the end (rows, 64) of k and of q
  Tile grad_scores, grad_q, grad_k;

  __device__ KeyPass(SharedMemory& shared, const BackwardInputs<T>& inputs, const Sizes& all_sizes,
                     const Place& own_place)
      : in(inputs),
        sizes(all_sizes),
        place(own_place),
        n_steps(sizes.n_steps(place.chunk)),
        rows(padded(n_steps)),
        n0(place.slice * tile_size),
        n_channels(sizes.d_key - n0 < tile_size ? sizes.d_key - n0 : tile_size),
        decays(shared),
        grad_outputs(shared),
        values(shared),
        grad_weights(shared),
        state(shared),
        grad_state(shared) {
    grad_scores.sums.clear();
    grad_q.sums.clear();
    grad_k.sums.clear();
  }

  __device__ int64_t key_offset() const {
    return sizes.key_at(place.b, sizes.begin(place.chunk), place.group) + n0;
  }

  /// Value channels from p0 on.
  __device__ void copy_slice(int h, int p0) const {
    const int p_columns = sizes.columns_from(p0);
    const int64_t value_offset = sizes.value_at(place.b, sizes.begin(place.chunk), h) + p0;
    const int64_t state_offset = sizes.head_chunk(place.b, h, place.chunk) * sizes.state_size() +
                                 static_cast<int64_t>(n0) * sizes.d_value + p0;
    copy_rows(grad_outputs, {in.grad_y + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
    copy_rows(values, {in.v + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
    copy_rows(state, {in.states + state_offset, sizes.d_value, n_channels, p_columns}, padded(n_channels));
    copy_rows(grad_state, {in.grad_states + state_offset, sizes.d_value, n_channels, p_columns},
              padded(n_channels));
  }

  /// What a slice of `columns` value channels gives to the three sums.
  __device__ void add_slice(int columns) {
    Tile product;
    product.sums.clear();
    product.add_product(grad_outputs, values.transposed(), {rows, rows, columns}, Zeros::result_upper);
    add_scaled(grad_scores, product, [&](int i, int j) {
      return i < rows && j < rows ? decays.between(i, j) * decays.scale[j] : 0.0f;
    });
    product.sums.clear();
    product.add_product(grad_outputs, state.transposed(), {rows, padded(n_channels), columns});
    add_scaled(grad_q, product, [&](int i, int) { return decays.from_start(i); });
    product.sums.clear();
    product.add_product(values, grad_state.transposed(), {rows, padded(n_channels), columns});
    add_scaled(grad_k, product, [&](int i, int) { return decays.to_end(i) * decays.scale[i]; });
  }

  /// The products with q and k, once for all heads.
  __device__ void add_scores() {
    const TileRows<T>&keys = state, &queries = grad_state;
    copy_rows(keys, {in.k + key_offset(), sizes.key_step(), n_steps, n_channels}, rows);
    copy_rows(queries, {in.q + key_offset(), sizes.key_step(), n_steps, n_channels}, rows);
    grad_scores.for_each([&](int i, int j, float value) {
      if (i < rows && j < rows) grad_weights.set(i, j, from_float<T>(value));
    });
    finish_copies();
    const Extent extent{rows, padded(n_channels), rows};
    grad_q.add_product(grad_weights, keys, extent, Zeros::left_upper);
    grad_k.add_product(grad_weights.transposed(), queries, extent, Zeros::left_lower);
  }

  template <class Element>
  __device__ void write(Element* q, Element* k) {
    const TargetRows<Element> to_q(q + key_offset(), sizes.key_step(), n_channels),
        to_k(k + key_offset(), sizes.key_step(), n_channels);
    grad_q.for_each_pair([&](int, int i, int n, float value, float next) {
      if (i < n_steps && n < n_channels) to_q.store(i, n, value, next);
    });
    grad_k.for_each_pair([&](int, int i, int n, float value, float next) {
      if (i < n_steps && n < n_channels) to_k.store(i, n, value, next);
    });
  }
};

/// A block owns a chunk, 64 key channels, and some heads of a group, which it adds up in order:
///   grad_q = (sum_h T_h) k + sum_h e_h (g_h S_h^T),   grad_k = (sum_h T_h)^T q + sum_h f_h (u_h dS'_h^T)
/// with T_h = (g_h u_h^T) o L_h: since q and k are the group's, the products with T are made once, of the sum. Threads:
/// Tile's; four tiles, 64 registers.
/// Shared, in KiB for bf16 (f32): ChunkDecays 1.5; g, v 18 (34); slices of S and dS', later of k and q 18 (34); T 9 (17):
/// 46.5 (86.5).
template <class T>
__global__ void __launch_bounds__(tile_block, 2)
    key_gradients(BackwardInputs<T> in, KeyGradients<T> out, Sizes sizes, HeadParts parts) {
  SharedMemory shared;
  const Place place(sizes, parts.n_parts, sizes.n_key_slices());
  KeyPass<T> pass(shared, in, sizes, place);
  for (int h = parts.first(sizes, place); h < parts.last(sizes, place); ++h) {
    for (int p0 = 0; p0 < sizes.d_value; p0 += tile_size) {
      pass.copy_slice(h, p0);
      if (p0 == 0) pass.decays.load(sizes, in.decays, in.value_scale, place, h);
      finish_copies();
      pass.add_slice(padded(sizes.columns_from(p0)));
      sync_block();
    }
  }
  pass.add_scores();
  if (parts.n_parts == 1) {
    pass.write(out.grad_q, out.grad_k);
  } else {
    const int64_t part_offset = place.part * sizes.batch * sizes.length * sizes.key_step();
    pass.write(out.q_parts + part_offset, out.k_parts + part_offset);
  }
}

constexpr int sum_block = 256;

/// target = the parts added in order, a thread N elements.
template <class T, int N>
__global__ void sum_parts(const float* parts, int n_parts, int64_t size, T* target) {
  const int64_t element = (static_cast<int64_t>(blockIdx.x) * sum_block + threadIdx.x) * N;
  if (element >= size) return;
  float sum[N];
  load_floats<N>(parts + element, sum);
  for (int part = 1; part < n_parts; ++part) {
    float more[N];
    load_floats<N>(parts + part * size + element, more);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += more[i];
  }
  store_floats<N>(target + element, sum);
}

// ---- launches

template <class T>
BackwardInputs<T> inputs_of(const MatrixStateBackwardArgs& args, const DecayTensors& decays,
                            const Tensor& states, const Tensor& grad_states) {
  const MatrixStateForwardArgs& forward = args.forward;
  return {forward.q.data<T>(),
          forward.k.data<T>(),
          forward.v.data<T>(),
          args.grad_y.data<T>(),
          forward.value_scale.data<float>(),
          forward.skip.data<float>(),
          forward.skip.defined() && forward.skip.shape().n_axes() == 2,
          decays.pointers(),
          states.data<T>(),
          grad_states.data<T>()};
}

template <class T>
void launch_value_gradients(const MatrixStateBackwardArgs& args, const BackwardInputs<T>& in,
                            const Sizes& sizes) {
  const Device device = args.grad_v.device();
  const int64_t n_rows = sizes.batch * sizes.n_chunks;
  const bool constant_decay = args.grad_log_decay.defined() && args.grad_log_decay.shape().n_axes() == 1;
  const Tensor decay_partials =
      constant_decay ? Tensor::empty({n_rows, sizes.n_heads}, DType::f32, device) : Tensor();
  const Tensor skip_partials = args.grad_skip.defined()
                                   ? Tensor::empty({n_rows, args.grad_skip.numel()}, DType::f32, device)
                                   : Tensor();
  const HeadParts parts = head_parts(sizes, 1);
  launch("matrix_state_value_gradients", value_gradients<T>,
         {.grid = {n_rows * sizes.n_groups * parts.n_parts},
          .block = tile_block,
          .shared_bytes = values_bytes(sizes, sizeof(T))},
         in,
         ValueGradients<T>{args.grad_v.data<T>(), args.grad_value_scale.data<float>(),
                           constant_decay ? nullptr : args.grad_log_decay.data<float>(),
                           decay_partials.data<float>(), skip_partials.data<float>()},
         sizes, parts);
  if (constant_decay) sum_partials_cuda(decay_partials, args.grad_log_decay, false);
  if (args.grad_skip.defined()) sum_partials_cuda(skip_partials, args.grad_skip, false);
}

template <class T>
void launch_sum_parts(const Tensor& parts, const Tensor& target) {
  const int64_t size = target.numel();
  dispatch_packing(can_pack(size, {target.raw_data()}), [&](auto packing) {
    constexpr int N = packing;
    launch("matrix_state_sum_parts", sum_parts<T, N>,
           {.grid = {blocks_for(size, sum_block * N)}, .block = sum_block}, parts.data<float>(),
           static_cast<int>(parts.dim(0)), size, target.data<T>());
  });
}

template <class T>
void launch_key_gradients(const MatrixStateBackwardArgs& args, const BackwardInputs<T>& in,
                          const Sizes& sizes) {
  const HeadParts parts = head_parts(sizes, sizes.n_key_slices());
  Tensor q_parts, k_parts;
  if (parts.n_parts > 1) {
    q_parts = Tensor::empty({parts.n_parts, args.grad_q.numel()}, DType::f32, args.grad_q.device());
    k_parts = empty_like(q_parts);
  }
  launch("matrix_state_key_gradients", key_gradients<T>,
         {.grid = {sizes.batch * sizes.n_chunks * sizes.n_groups * parts.n_parts * sizes.n_key_slices()},
          .block = tile_block,
          .shared_bytes = keys_bytes(sizeof(T))},
         in,
         KeyGradients<T>{args.grad_q.data<T>(), args.grad_k.data<T>(), q_parts.data<float>(),
                         k_parts.data<float>()},
         sizes, parts);
  if (parts.n_parts == 1) return;
  launch_sum_parts<T>(q_parts, args.grad_q);
  launch_sum_parts<T>(k_parts, args.grad_k);
}

int64_t backward_bytes(const Sizes& sizes, int element_bytes) {
  return std::max(values_bytes(sizes, element_bytes), keys_bytes(element_bytes));
}

}  // namespace
}  // namespace matrix_state

void chunked_matrix_state_backward_cuda(const MatrixStateBackwardArgs& args) {
  using namespace matrix_state;
  const MatrixStateForwardArgs& forward = args.forward;
  const std::optional<Sizes> plan = plan_sizes(forward, backward_bytes);
  if (!plan) {  // too wide for any tile
    recurrent_matrix_state_backward_cuda(args);
    return;
  }
  const Sizes& sizes = *plan;
  const DType dtype = forward.q.dtype();
  const DecayTensors decays = chunk_decays(forward, sizes);
  const Tensor states =
      pass_states(chunk_states(forward.k, forward.v, forward.value_scale, decays, Decays::to_end, sizes),
                  decays, forward.initial_state, {}, dtype, false, sizes);
  const Tensor grad_states =
      pass_states(chunk_states(forward.q, args.grad_y, {}, decays, Decays::from_start, sizes), decays,
                  args.grad_final_state, args.grad_initial_state, dtype, true, sizes);
  dispatch_cuda(dtype, "chunked_matrix_state", [&](auto element) {
    using T = decltype(element);
    const BackwardInputs<T> in = inputs_of<T>(args, decays, states, grad_states);
    launch_value_gradients<T>(args, in, sizes);
    launch_key_gradients<T>(args, in, sizes);
  });
}

}  // namespace headwater
