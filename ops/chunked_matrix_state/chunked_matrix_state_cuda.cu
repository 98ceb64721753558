// The chunked form, forward, in four steps: decays within chunks, the state that every chunk builds from zero, the
// passing of states from chunk to chunk (matrix_state_passing_cuda.cu), and the outputs of every chunk from the state
// that enters it. All but the passing run over all chunks at once.
//
// Letters as in chunked_matrix_state_cpu.cpp. value_scale is folded into the factors of v, so that v itself is the
// matrix units' operand.

#include <algorithm>

#include "ops/chunked_matrix_state/matrix_state_tiles.h"

namespace headwater {
namespace matrix_state {
namespace {

/// Shared memory of `outputs`.
int64_t outputs_bytes(const Sizes& sizes, int element_bytes) {
  return ChunkDecays::bytes + 2 * tile_rows_bytes(element_bytes) +
         tile_rows_bytes(element_bytes, std::max(sizes.rows, sizes.key_slice)) +
         rows_bytes(sizes.rows, padded(sizes.d_key), element_bytes);
}

template <class T>
struct OutputArgs {
  const T *q, *k;            // (batch, length, n_groups, d_key)
  const T* v;                // (batch, length, n_heads, d_value)
  const float* value_scale;  // (batch, length, n_heads) or nullptr
  const float* skip;         // nullptr: none
  bool skip_per_channel;     // (n_heads, d_value), else (n_heads)
  Decays decays;
  const T* states;  // entering each chunk: (batch, n_heads, n_chunks, d_key, d_value)
  T* y;             // (batch, length, n_heads, d_value)
};

/// A block owns a chunk, some heads of a group, one after another, and 64 value channels. What the heads share, q k^T,
/// stays in registers, q in shared memory. Threads: Tile's; two tiles, 32 registers.
/// Shared, with 64 steps, d_key 128, d_value 64, in KiB for bf16 (f32): ChunkDecays 1.5; q (rows, d_key) 17 (33); a slice
/// of k (rows, 64), later of the state (key_slice, 64) 18 (34); v (rows, 64) 9 (17); weights (rows, rows) 9 (17): 54.5 (102.5).
template <class T>
__global__ void __launch_bounds__(tile_block, 2) outputs(OutputArgs<T> args, Sizes sizes, HeadParts parts) {
  SharedMemory shared;
  const ChunkDecays decays(shared);
  const TileRows<T> values(shared), weights(shared);
  const TileRows<T> slice(shared, sizes.rows > sizes.key_slice ? sizes.rows : sizes.key_slice);
  const SharedRows<T> queries = shared_rows<T>(shared, sizes.rows, padded(sizes.d_key));

  const Place place(sizes, parts.n_parts, sizes.n_value_slices());
  const int64_t begin = sizes.begin(place.chunk);
  const int n_steps = sizes.n_steps(place.chunk), rows = padded(n_steps);
  const int p0 = place.slice * tile_size, p_columns = sizes.columns_from(p0);

  Tile scores;
  const int64_t key_offset = sizes.key_at(place.b, begin, place.group);
  copy_rows(queries, {args.q + key_offset, sizes.key_step(), n_steps, sizes.d_key}, rows);
  compute_scores(scores, queries, slice, args.k + key_offset, n_steps, sizes);

  for (int h = parts.first(sizes, place); h < parts.last(sizes, place); ++h) {
    const int64_t value_offset = sizes.value_at(place.b, begin, h) + p0;
    const T* head_states = args.states + sizes.head_chunk(place.b, h, place.chunk) * sizes.state_size() + p0;
    copy_rows(values, {args.v + value_offset, sizes.value_step(), n_steps, p_columns}, rows);
    copy_state(slice, head_states, 0, p_columns, sizes);
    decays.load(sizes, args.decays, args.value_scale, place, h);
    sync_block();
    scores.for_each([&](int i, int j, float score) {
      if (i < rows && j < rows)
        weights.set(i, j, from_float<T>(score * decays.between(i, j) * decays.scale[j]));
    });
    Tile result;
    compute_state_product(result, queries, slice, head_states, rows, p_columns, sizes);
    result.for_each([&](int i, int, float& value) { value *= decays.from_start(i); });
    result.add_product(weights, values, {rows, padded(p_columns), rows}, Zeros::left_upper);

    const float head_skip = args.skip != nullptr && !args.skip_per_channel ? args.skip[h] : 0.0f;
    const float* skips = args.skip != nullptr && args.skip_per_channel
                             ? args.skip + static_cast<int64_t>(h) * sizes.d_value + p0
                             : nullptr;
    const TargetRows<T> y(args.y + value_offset, sizes.value_step(), p_columns);
    result.for_each_pair([&](int, int i, int p, float value, float next) {
      if (i >= n_steps || p >= p_columns) return;
      if (args.skip != nullptr) {
        value += (skips != nullptr ? skips[p] : head_skip) * to_float(values.get(i, p));
        const bool has_next = p + 1 < p_columns;
        next += (skips != nullptr && has_next ? skips[p + 1] : head_skip) * to_float(values.get(i, p + 1));
      }
      y.store(i, p, value, next);
    });
    sync_block();
  }
}

}  // namespace
}  // namespace matrix_state

void chunked_matrix_state_forward_cuda(const MatrixStateForwardArgs& args) {
  using namespace matrix_state;
  const std::optional<Sizes> plan = plan_sizes(args, outputs_bytes);
  if (!plan) {  // too wide for any tile
    recurrent_matrix_state_forward_cuda(args);
    return;
  }
  const Sizes& sizes = *plan;
  const DecayTensors decays = chunk_decays(args, sizes);
  const Tensor own = chunk_states(args.k, args.v, args.value_scale, decays, Decays::to_end, sizes);
  const Tensor states =
      pass_states(own, decays, args.initial_state, args.final_state, args.q.dtype(), false, sizes);
  const HeadParts parts = head_parts(sizes, sizes.n_value_slices());
  dispatch_cuda(args.q.dtype(), "chunked_matrix_state", [&](auto element) {
    using T = decltype(element);
    launch("matrix_state_outputs", outputs<T>,
           {.grid = {sizes.batch * sizes.n_chunks * sizes.n_groups * parts.n_parts * sizes.n_value_slices()},
            .block = tile_block,
            .shared_bytes = outputs_bytes(sizes, sizeof(T))},
           OutputArgs<T>{args.q.data<T>(), args.k.data<T>(), args.v.data<T>(), args.value_scale.data<float>(),
                         args.skip.data<float>(), args.skip.defined() && args.skip.shape().n_axes() == 2,
                         decays.pointers(), states.data<T>(), args.y.data<T>()},
           sizes, parts);
  });
}

}  // namespace headwater
