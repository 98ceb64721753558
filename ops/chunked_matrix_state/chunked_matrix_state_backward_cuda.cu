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
  float* skip_partials;     // (batch * n_chunks, n_heads, d_value or 1)
};

/// Sums over channels, a number for each step, from the thread's two rows of a tile.
struct StepSums {
  float of_queries[2] = {0.0f, 0.0f};  // e[i] q[i].(S g[i])
  float of_keys[2] = {0.0f, 0.0f};     // f[i] u[i].(dS'^T k[i])
  float of_scales[2] = {0.0f, 0.0f};   // v[i].grad_u[i]
};

/// Small sums in shared memory, by the names of what they hold.
struct ValueSums {
  SharedArray<float> queries, keys, scales;  // StepSums of each step: (2 halves of the tile's columns, steps)
  SharedArray<float> left_rows;              // sums over the left half of each row
  SharedArray<float> columns;                // (4 warps that share columns, steps)
  SharedArray<float> skip;                   // (4, channels)
  SharedArray<float> scratch;                // of block_sum

  __device__ explicit ValueSums(SharedMemory& shared)
      : queries(shared.array<float>(2 * tile_size)),
        keys(shared.array<float>(2 * tile_size)),
        scales(shared.array<float>(2 * tile_size)),
        left_rows(shared.array<float>(tile_size)),
        columns(shared.array<float>(4 * tile_size)),
        skip(shared.array<float>(4 * tile_size)),
        scratch(shared.array<float>(tile_block / warp_size)) {}
  static constexpr int64_t bytes = shared_bytes<float>(15 * tile_size + tile_block / warp_size);
};

int64_t values_bytes(const Sizes& sizes, int element_bytes) {
  return ChunkDecays::bytes + ValueSums::bytes +
         2 * rows_bytes(sizes.rows, padded(sizes.d_key), element_bytes) +
         2 * rows_bytes(sizes.key_slice, sizes.value_columns(), element_bytes) +
         2 * rows_bytes(sizes.rows, sizes.value_columns(), element_bytes) +
         rows_bytes(sizes.rows, sizes.rows, element_bytes);
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

/// columns[w][j] = the sum over the rows i >= j of warp w's 16; whole block.
__device__ inline void sum_columns_below(const Tile& tile, const SharedArray<float>& columns) {
  const int row = Tile::first_row() + fragment_row(0), column = Tile::first_column() + fragment_column(0);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = column + 8 * n + i;
      float sum = row >= j ? tile.sums.fragments[0][n].values[i] : 0.0f;
      sum += row + 8 >= j ? tile.sums.fragments[0][n].values[2 + i] : 0.0f;
      for (int mask = 4; mask < warp_size; mask *= 2) sum += shuffle_xor(sum, mask);
      if (lane_index() < 4) columns[Tile::first_row() / 16 * tile_size + j] = sum;
    }
  }
}

/// Writes StepSums to shared memory.
__device__ inline void deliver(const StepSums& steps, const ValueSums& sums) {
  const int half = Tile::first_column() / 32, row = Tile::first_row() + fragment_row(0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float queries = row_sum(steps.of_queries[i]), keys = row_sum(steps.of_keys[i]),
                scales = row_sum(steps.of_scales[i]);
    if (lane_index() % 4 != 0) continue;
    const int index = half * tile_size + row + 8 * i;
    sums.queries[index] = queries;
    sums.keys[index] = keys;
    sums.scales[index] = scales;
  }
}

/// The first warp, two steps a lane, brings together
///   grad_log_decay[i] = within[i] + sum_{t >= i} queries[t] + sum_{s < i} keys[s] + through <S, dS'>
/// as sums over these very ranges, and writes it and grad_value_scale.
template <class T>
__device__ void write_steps(const ValueGradients<T>& out, const ValueSums& sums, float through,
                            const Sizes& sizes, const Place& place, int h) {
  if (warp_index() != 0) return;
  const int first = 2 * lane_index(), n_steps = sizes.n_steps(place.chunk);
  float queries[2], keys[2], within[2];
  for (int i = 0; i < 2; ++i) {
    const int step = first + i;
    queries[i] = sums.queries[step] + sums.queries[tile_size + step];
    keys[i] = sums.keys[step] + sums.keys[tile_size + step];
    within[i] = 0.0f;
    for (int warp = 0; warp < 4; ++warp) within[i] += sums.columns[warp * tile_size + step];
  }
  float queries_from = queries[0] + queries[1], keys_until = keys[0] + keys[1];
  for (int delta = 1; delta < warp_size; delta *= 2) {
    const float after = shuffle_down(queries_from, delta), before = shuffle_up(keys_until, delta);
    if (lane_index() + delta < warp_size) queries_from += after;
    if (lane_index() >= delta) keys_until += before;
  }
  const float queries_after = shuffle_down(queries_from, 1), keys_before = shuffle_up(keys_until, 1);
  const float later = lane_index() == warp_size - 1 ? 0.0f : queries_after;
  const float earlier = lane_index() == 0 ? 0.0f : keys_before;
  const float total[2] = {within[0] + (later + queries[1] + queries[0]) + earlier + through,
                          within[1] + (later + queries[1]) + (earlier + keys[0]) + through};
  float sum = 0.0f;
  for (int i = 0; i < 2; ++i) {
    const int step = first + i;
    if (step >= n_steps) continue;
    const int64_t at = sizes.step_at(place.b, sizes.begin(place.chunk) + step, h);
    if (out.grad_log_decay != nullptr) out.grad_log_decay[at] = total[i];
    if (out.grad_value_scale != nullptr)
      out.grad_value_scale[at] = sums.scales[step] + sums.scales[tile_size + step];
    sum += total[i];
  }
  sum = warp_sum(sum);
  if (out.decay_partials != nullptr && lane_index() == 0) {
    out.decay_partials[(place.b * sizes.n_chunks + place.chunk) * sizes.n_heads + h] = sum;
  }
}

/// Sums of g v over the chunk's steps, a thread for each channel and quarter of the steps; in the first 64 threads.
template <class T>
__device__ float skip_sum(const SharedRows<T>& grad_outputs, const SharedRows<T>& values,
                          const SharedArray<float>& scratch, int n_steps, int p_columns) {
  const int p = static_cast<int>(threadIdx.x) % tile_size,
            quarter = static_cast<int>(threadIdx.x) / tile_size;
  float sum = 0.0f;
  for (int i = quarter; i < n_steps && p < p_columns; i += 4) {
    sum += to_float(grad_outputs.get(i, p)) * to_float(values.get(i, p));
  }
  scratch[quarter * tile_size + p] = sum;
  sync_block();
  return quarter > 0
             ? 0.0f
             : scratch[p] + scratch[tile_size + p] + scratch[2 * tile_size + p] + scratch[3 * tile_size + p];
}

/// The thread's part of <S, dS'> of a slice in shared memory.
template <class T>
__device__ float inner_product(const SharedRows<T>& a, const SharedRows<T>& b, int rows, int columns) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const int packs = columns / width;
  float sum = 0.0f;
  for (int item = static_cast<int>(threadIdx.x); item < rows * packs; item += tile_block) {
    const int index = item / packs * a.row_step + item % packs * width;
    const Packed<T, width> x = a.data.template load<width>(index), y = b.data.template load<width>(index);
#pragma unroll
    for (int i = 0; i < width; ++i) sum += to_float(x.values[i]) * to_float(y.values[i]);
  }
  return sum;
}

/// Shared memory of a block of `value_gradients`, and what it works on.
template <class T>
struct ValuePass {
  const ChunkDecays decays;
  const ValueSums sums;
  const SharedRows<T> queries, keys;         // (rows, d_key)
  const SharedRows<T> state, grad_state;     // slices (key_slice, 64)
  const SharedRows<T> grad_outputs, values;  // (rows, 64)
  const SharedRows<T> weights;               // (rows, rows)
  const int n_steps, rows;

  __device__ ValuePass(SharedMemory& shared, const Sizes& sizes, const Place& place)
      : decays(shared),
        sums(shared),
        queries(shared_rows<T>(shared, sizes.rows, padded(sizes.d_key))),
        keys(shared_rows<T>(shared, sizes.rows, padded(sizes.d_key))),
        state(shared_rows<T>(shared, sizes.key_slice, sizes.value_columns())),
        grad_state(shared_rows<T>(shared, sizes.key_slice, sizes.value_columns())),
        grad_outputs(shared_rows<T>(shared, sizes.rows, sizes.value_columns())),
        values(shared_rows<T>(shared, sizes.rows, sizes.value_columns())),
        weights(shared_rows<T>(shared, sizes.rows, sizes.rows)),
        n_steps(sizes.n_steps(place.chunk)),
        rows(padded(n_steps)) {}

  /// through_queries = q S, through_keys = k dS'; adds to the thread's part of <S, dS'>. Slice 0 is on its way.
  __device__ void compute_state_products(Tile& through_queries, Tile& through_keys, float& inner,
                                         const T* states, const T* grad_states, int p_columns,
                                         const Sizes& sizes) const {
    through_queries.sums.clear();
    through_keys.sums.clear();
    for (int n0 = 0; n0 < sizes.d_key; n0 += sizes.key_slice) {
      if (n0 > 0) {
        sync_block();
        copy_state(state, states, n0, p_columns, sizes);
        copy_state(grad_state, grad_states, n0, p_columns, sizes);
      }
      finish_copies();
      const int depth = slice_depth(sizes, n0);
      const Extent extent{rows, padded(p_columns), depth};
      through_queries.add_product(queries.at(0, n0), state, extent);
      through_keys.add_product(keys.at(0, n0), grad_state, extent);
      inner += inner_product(state, grad_state, depth, padded(p_columns));
    }
  }

  /// From q S and k dS' of these channels: adds to the steps' sums, makes grad_u of through_keys.
  __device__ void compute_grad_values(Tile& through_queries, Tile& through_keys, StepSums& steps,
                                      int columns) const {
    through_queries.for_each_pair([&](int half, int i, int p, float value, float next) {
      if (i >= rows || p >= columns) return;
      const float product =
          value * to_float(grad_outputs.get(i, p)) + next * to_float(grad_outputs.get(i, p + 1));
      steps.of_queries[half] += decays.from_start(i) * product;
    });
    through_keys.for_each_pair([&](int half, int i, int p, float& value, float& next) {
      if (i >= rows || p >= columns) return;
      value *= decays.to_end(i);
      next *= decays.to_end(i);
      const float product = value * to_float(values.get(i, p)) + next * to_float(values.get(i, p + 1));
      steps.of_keys[half] += decays.scale[i] * product;
    });
    through_keys.add_product(weights.transposed(), grad_outputs, {rows, columns, rows}, Zeros::left_lower);
  }

  /// grad_v = value_scale grad_u + skip g, at `to` with channels from p0 on; `skips` begin with channel p0.
  __device__ void write_grad_values(Tile& grad_values, StepSums& steps, T* to, int64_t step,
                                    const float* skip, bool skip_per_channel, int p_columns) const {
    grad_values.for_each_pair([&](int half, int i, int p, float value, float next) {
      if (i >= n_steps || p >= p_columns) return;
      steps.of_scales[half] += value * to_float(values.get(i, p)) + next * to_float(values.get(i, p + 1));
      value *= decays.scale[i];
      next *= decays.scale[i];
      if (skip != nullptr) {
        value += skip[skip_per_channel ? p : 0] * to_float(grad_outputs.get(i, p));
        next +=
            skip[skip_per_channel && p + 1 < p_columns ? p + 1 : 0] * to_float(grad_outputs.get(i, p + 1));
      }
      store_pair(to + i * step, p, p_columns, value, next);
    });
  }
};

/// A block owns a chunk and some heads of a group, one after another; each head's value channels are walked 64 at a time,
/// its key channels key_slice at a time. q k^T, which the heads share, stays in registers. Threads: Tile's; four tiles,
/// 64 registers.
/// Shared, with 64 steps, d_key 128, d_value 64, in KiB for bf16 (f32): decays and sums 5.3; q, k 34 (66); slices of S and
/// dS' 36 (68); g, v 18 (34); weights 9 (17): 102 (190).
template <class T>
__global__ void __launch_bounds__(tile_block, 2)
    value_gradients(BackwardInputs<T> in, ValueGradients<T> out, Sizes sizes, HeadParts parts) {
  SharedMemory shared;
  const Place place(sizes, parts.n_parts, 1);
  const ValuePass<T> pass(shared, sizes, place);
  const int64_t begin = sizes.begin(place.chunk), key_offset = sizes.key_at(place.b, begin, place.group);
  const int rows = pass.rows, n_steps = pass.n_steps;
  copy_rows(pass.queries, {in.q + key_offset, sizes.key_step(), n_steps, sizes.d_key}, rows);
  copy_rows(pass.keys, {in.k + key_offset, sizes.key_step(), n_steps, sizes.d_key}, rows);
  finish_copies();
  Tile scores;
  scores.sums.clear();
  scores.add_product(pass.queries, pass.keys.transposed(), {rows, rows, padded(sizes.d_key)},
                     Zeros::result_upper);

  for (int h = parts.first(sizes, place); h < parts.last(sizes, place); ++h) {
    const int64_t head_chunk = sizes.head_chunk(place.b, h, place.chunk);
    const float* skip = in.skip == nullptr
                            ? nullptr
                            : in.skip + (in.skip_per_channel ? static_cast<int64_t>(h) * sizes.d_value : h);
    StepSums steps;
    Tile grad_scores;
    grad_scores.sums.clear();
    float inner = 0.0f, head_skip = 0.0f;
    pass.decays.load(sizes, in.decays, in.value_scale, place, h);
    sync_block();
    scores.for_each([&](int i, int j, float score) {
      if (i < rows && j < rows) pass.weights.set(i, j, from_float<T>(score * pass.decays.between(i, j)));
    });
    for (int p0 = 0; p0 < sizes.d_value; p0 += tile_size) {
      const int p_columns = sizes.columns_from(p0), columns = padded(p_columns);
      const int64_t value_offset = sizes.value_at(place.b, begin, h) + p0;
      const T* states = in.states + head_chunk * sizes.state_size() + p0;
      const T* grad_states = in.grad_states + head_chunk * sizes.state_size() + p0;
      copy_rows(pass.values, {in.v + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
      copy_rows(pass.grad_outputs, {in.grad_y + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
      copy_state(pass.state, states, 0, p_columns, sizes);
      copy_state(pass.grad_state, grad_states, 0, p_columns, sizes);
      Tile through_queries, through_keys;
      pass.compute_state_products(through_queries, through_keys, inner, states, grad_states, p_columns,
                                  sizes);
      grad_scores.add_product(pass.grad_outputs, pass.values.transposed(), {rows, rows, columns},
                              Zeros::result_upper);
      pass.compute_grad_values(through_queries, through_keys, steps, columns);
      pass.write_grad_values(through_keys, steps, out.grad_v + value_offset, sizes.value_step(),
                             skip == nullptr ? nullptr : skip + (in.skip_per_channel ? p0 : 0),
                             in.skip_per_channel, p_columns);
      if (out.skip_partials != nullptr) {
        const float sum = skip_sum(pass.grad_outputs, pass.values, pass.sums.skip, n_steps, p_columns);
        const int p = static_cast<int>(threadIdx.x);
        head_skip += sum;
        if (in.skip_per_channel && p < p_columns) {
          out.skip_partials[((place.b * sizes.n_chunks + place.chunk) * sizes.n_heads + h) * sizes.d_value +
                            p0 + p] = sum;
        }
      }
      sync_block();
    }
    // W_ts = grad_scores o weights: what the decays between s and t scale.
    grad_scores.for_each([&](int i, int j, float& value) {
      value = i < rows && j < rows ? value * to_float(pass.weights.get(i, j)) * pass.decays.scale[j] : 0.0f;
    });
    sum_rows_before(grad_scores, pass.sums.left_rows);
    sum_columns_below(grad_scores, pass.sums.columns);
    deliver(steps, pass.sums);
    inner = block_sum(inner, pass.sums.scratch);
    write_steps(out, pass.sums, in.decays.through[head_chunk] * inner, sizes, place, h);
    if (out.skip_partials != nullptr && !in.skip_per_channel) {
      head_skip = block_sum(head_skip, pass.sums.scratch);
      if (threadIdx.x == 0)
        out.skip_partials[(place.b * sizes.n_chunks + place.chunk) * sizes.n_heads + h] = head_skip;
    }
    sync_block();
  }
}

// ---- what the heads of a group share

template <class T>
struct KeyGradients {
  T *grad_q, *grad_k;        // (batch, length, n_groups, d_key); written where there is one part
  float *q_parts, *k_parts;  // (n_parts, batch, length, n_groups, d_key); written where there are several
};

int64_t keys_bytes(const Sizes& sizes, int element_bytes) {
  return ChunkDecays::bytes + 2 * rows_bytes(sizes.rows, sizes.value_columns(), element_bytes) +
         2 * either_bytes(tile_size, sizes.value_columns(), sizes.rows, tile_size, element_bytes) +
         rows_bytes(sizes.rows, sizes.rows, element_bytes);
}

/// A block owns a chunk, 64 key channels, and some heads of a group, which it adds up in order:
///   grad_q = (sum_h T_h) k + sum_h e_h (g_h S_h^T),   grad_k = (sum_h T_h)^T q + sum_h f_h (u_h dS'_h^T)
/// with T_h = (g_h u_h^T) o L_h: since q and k are the group's, the products with T are made once, of the sum. Threads:
/// Tile's; four tiles, 64 registers.
/// Shared, with 64 steps and d_value 64, in KiB for bf16 (f32): ChunkDecays 1.5; g, v 18 (34); slices of S and dS', later
/// of k and q 18 (34); T 9 (17): 46.5 (86.5).
template <class T>
__global__ void __launch_bounds__(tile_block, 2)
    key_gradients(BackwardInputs<T> in, KeyGradients<T> out, Sizes sizes, HeadParts parts) {
  SharedMemory shared;
  const ChunkDecays decays(shared);
  const SharedRows<T> grad_outputs = shared_rows<T>(shared, sizes.rows, sizes.value_columns());
  const SharedRows<T> values = shared_rows<T>(shared, sizes.rows, sizes.value_columns());
  const SharedArray<T> one = either_rows<T>(shared, tile_size, sizes.value_columns(), sizes.rows, tile_size);
  const SharedArray<T> other =
      either_rows<T>(shared, tile_size, sizes.value_columns(), sizes.rows, tile_size);
  const SharedRows<T> state{one, 0, row_step<T>(sizes.value_columns())},
      queries{one, 0, row_step<T>(tile_size)};
  const SharedRows<T> grad_state{other, 0, row_step<T>(sizes.value_columns())},
      keys{other, 0, row_step<T>(tile_size)};
  const SharedRows<T> grad_weights = shared_rows<T>(shared, sizes.rows, sizes.rows);

  const Place place(sizes, parts.n_parts, sizes.n_key_slices());
  const int64_t begin = sizes.begin(place.chunk);
  const int n_steps = sizes.n_steps(place.chunk), rows = padded(n_steps);
  const int n0 = place.slice * tile_size;
  const int n_channels = sizes.d_key - n0 < tile_size ? sizes.d_key - n0 : tile_size;

  Tile grad_scores, grad_q, grad_k;
  grad_scores.sums.clear();
  grad_q.sums.clear();
  grad_k.sums.clear();
  for (int h = parts.first(sizes, place); h < parts.last(sizes, place); ++h) {
    const int64_t state_offset = sizes.head_chunk(place.b, h, place.chunk) * sizes.state_size() +
                                 static_cast<int64_t>(n0) * sizes.d_value;
    decays.load(sizes, in.decays, in.value_scale, place, h);
    for (int p0 = 0; p0 < sizes.d_value; p0 += tile_size) {
      const int p_columns = sizes.columns_from(p0), columns = padded(p_columns);
      const int64_t value_offset = sizes.value_at(place.b, begin, h) + p0;
      copy_rows(grad_outputs, {in.grad_y + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
      copy_rows(values, {in.v + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
      copy_rows(state, {in.states + state_offset + p0, sizes.d_value, n_channels, p_columns},
                padded(n_channels));
      copy_rows(grad_state, {in.grad_states + state_offset + p0, sizes.d_value, n_channels, p_columns},
                padded(n_channels));
      finish_copies();
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
      sync_block();
    }
  }

  const int64_t key_offset = sizes.key_at(place.b, begin, place.group) + n0;
  copy_rows(queries, {in.q + key_offset, sizes.key_step(), n_steps, n_channels}, rows);
  copy_rows(keys, {in.k + key_offset, sizes.key_step(), n_steps, n_channels}, rows);
  grad_scores.for_each([&](int i, int j, float value) {
    if (i < rows && j < rows) grad_weights.set(i, j, from_float<T>(value));
  });
  finish_copies();
  const Extent extent{rows, padded(n_channels), rows};
  grad_q.add_product(grad_weights, keys, extent, Zeros::left_upper);
  grad_k.add_product(grad_weights.transposed(), queries, extent, Zeros::left_lower);
  const auto write = [&](Tile& tile, T* whole, float* part_sums) {
    const int64_t part_offset = place.part * sizes.batch * sizes.length * sizes.key_step() + key_offset;
    tile.for_each_pair([&](int, int i, int n, float value, float next) {
      if (i >= n_steps) return;
      if (parts.n_parts == 1) {
        store_pair(whole + key_offset + i * sizes.key_step(), n, n_channels, value, next);
      } else {
        store_pair(part_sums + part_offset + i * sizes.key_step(), n, n_channels, value, next);
      }
    });
  };
  write(grad_q, out.grad_q, out.q_parts);
  write(grad_k, out.grad_k, out.k_parts);
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
          .shared_bytes = keys_bytes(sizes, sizeof(T))},
         in,
         KeyGradients<T>{args.grad_q.data<T>(), args.grad_k.data<T>(), q_parts.data<float>(),
                         k_parts.data<float>()},
         sizes, parts);
  if (parts.n_parts == 1) return;
  launch_sum_parts<T>(q_parts, args.grad_q);
  launch_sum_parts<T>(k_parts, args.grad_k);
}

int64_t backward_bytes(const Sizes& sizes, int element_bytes) {
  return std::max(values_bytes(sizes, element_bytes), keys_bytes(sizes, element_bytes));
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
