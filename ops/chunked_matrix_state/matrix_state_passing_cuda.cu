// The steps that the forward and the backward of the chunked form share: decays within chunks, the states that chunks
// build, and their passing from chunk to chunk.
//
// Letters as in chunked_matrix_state_cpu.cpp.

#include <algorithm>

#include "ops/chunked_matrix_state/matrix_state_tiles.h"
#include "ops/packed_rows.h"

namespace headwater::matrix_state {
namespace {

// ---- decays

struct DecayArgs {
  const float* log_decay;  // nullptr: none
  bool constant;           // (n_heads), else (batch, length, n_heads)
  const int32_t* resets;   // (batch, length) or nullptr
  float *rows, *through;
  int32_t* segments;
};

/// v of the lanes up to and including this one, combined by `combine`.
template <class T, class Combine>
__device__ T scan_lanes(T value, const Combine& combine) {
  for (int delta = 1; delta < warp_size; delta *= 2) {
    const T before = shuffle_up(value, delta);
    if (lane_index() >= delta) value = combine(before, value);
  }
  return value;
}

constexpr int decay_block = 256;

/// A warp owns a chunk of one head (the block's warps: neighbouring heads, which share the lines that they read), a lane
/// two neighbouring steps. Sums in double: they are kept as pairs of floats, whose differences are exact.
__global__ void sum_decays(DecayArgs args, Sizes sizes) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
  if (item >= sizes.batch * sizes.n_chunks * sizes.n_heads) return;
  const int h = static_cast<int>(item % sizes.n_heads);
  const int64_t chunk = item / sizes.n_heads % sizes.n_chunks, b = item / sizes.n_heads / sizes.n_chunks;
  const int n_steps = sizes.n_steps(chunk), first = 2 * lane_index();

  double decay[2];
  int last_reset[2];  // at or before the step; -1: none
  for (int i = 0; i < 2; ++i) {
    const int64_t t = sizes.begin(chunk) + first + i;
    const bool inside = first + i < n_steps;
    const bool reset = inside && args.resets != nullptr && args.resets[b * sizes.length + t] != 0;
    // The decay into a document's first step multiplies nothing.
    const bool decays = inside && !reset && args.log_decay != nullptr;
    decay[i] = decays ? static_cast<double>(args.log_decay[args.constant ? h : sizes.step_at(b, t, h)]) : 0.0;
    last_reset[i] = reset ? first + i : -1;
  }
  const auto add = [](double a, double c) { return a + c; };
  const auto larger = [](int a, int c) { return a > c ? a : c; };
  const double sum_through = scan_lanes(decay[0] + decay[1], add);
  const int reset_through = scan_lanes(larger(last_reset[0], last_reset[1]), larger);
  const double sum_before = shuffle_up(sum_through, 1);
  const int reset_before = shuffle_up(reset_through, 1);
  const double total = shuffle(sum_through, warp_size - 1);
  const int final_reset = shuffle(reset_through, warp_size - 1);

  double sum = lane_index() == 0 ? 0.0 : sum_before;
  int reset = lane_index() == 0 ? -1 : reset_before;
  const int64_t head_chunk = sizes.head_chunk(b, h, chunk);
  float* rows = args.rows + head_chunk * decay_rows_size;
  for (int i = 0; i < 2; ++i) {
    const int step = first + i;
    const bool inside = step < n_steps;
    sum += decay[i];
    reset = larger(reset, last_reset[i]);
    const float high = static_cast<float>(sum);
    rows[Decays::high * tile_size + step] = high;
    rows[Decays::low * tile_size + step] = static_cast<float>(sum - static_cast<double>(high));
    rows[Decays::from_start * tile_size + step] = inside && reset < 0 ? expf(high) : 0.0f;
    rows[Decays::to_end * tile_size + step] =
        inside && final_reset <= step ? expf(static_cast<float>(total - sum)) : 0.0f;
    // Steps beyond the chunk see none.
    if (h == 0) {
      args.segments[(b * sizes.n_chunks + chunk) * tile_size + step] = !inside ? tile_size : larger(reset, 0);
    }
  }
  if (lane_index() == 0) args.through[head_chunk] = final_reset < 0 ? expf(static_cast<float>(total)) : 0.0f;
}

// ---- states of chunks

template <class T>
struct StatesArgs {
  const T* keys;             // (batch, length, n_groups, d_key)
  const T* values;           // (batch, length, n_heads, d_value)
  const float* value_scale;  // or nullptr
  const float* decays;       // Decays::rows
  Decays::Row factors;
  float* states;
};

template <class T>
__device__ void load_factors(const StatesArgs<T>& args, const Sizes& sizes, const Place& place, int h,
                             const SharedArray<float>& factors) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= sizes.n_steps(place.chunk)) return;
  const int64_t step = sizes.step_at(place.b, sizes.begin(place.chunk) + i, h);
  const float factor =
      args.decays[sizes.head_chunk(place.b, h, place.chunk) * decay_rows_size + args.factors * tile_size + i];
  factors[i] = args.value_scale != nullptr ? factor * args.value_scale[step] : factor;
}

/// A block owns one head's chunk and 64 value channels, and walks the key channels 64 at a time: states = keys^T
/// (factors values). Threads: Tile's.
/// Shared: 64 factors, values (rows, 64), keys (rows, 64): 18.3 KiB with bf16, 34.3 KiB with f32, at 64 steps.
template <class T>
__global__ void __launch_bounds__(tile_block, 4) build_states(StatesArgs<T> args, Sizes sizes) {
  SharedMemory shared;
  const SharedArray<float> factors = shared.array<float>(tile_size);
  const TileRows<T> values(shared), keys(shared);
  const Place place(sizes, sizes.heads_per_group(), sizes.n_value_slices());
  const int h = place.group * sizes.heads_per_group() + place.part;
  const int n_steps = sizes.n_steps(place.chunk), rows = padded(n_steps);
  const int64_t begin = sizes.begin(place.chunk), head_chunk = sizes.head_chunk(place.b, h, place.chunk);
  const int p0 = place.slice * tile_size, p_columns = sizes.columns_from(p0);

  const T* key_rows = args.keys + sizes.key_at(place.b, begin, place.group);
  for (int n0 = 0; n0 < sizes.d_key; n0 += tile_size) {
    const int n_columns = sizes.d_key - n0 < tile_size ? sizes.d_key - n0 : tile_size;
    copy_rows(keys, {key_rows + n0, sizes.key_step(), n_steps, n_columns}, rows);
    if (n0 == 0) {
      load_factors(args, sizes, place, h, factors);
      sync_block();
      const T* from = args.values + sizes.value_at(place.b, begin, h) + p0;
      copy_scaled_rows(values, {from, sizes.value_step(), n_steps, p_columns}, rows, factors);
    }
    finish_copies();
    Tile state;
    state.sums.clear();
    state.add_product(keys.transposed(), values, {padded(n_columns), padded(p_columns), rows});
    const TargetRows<float> target(
        args.states + head_chunk * sizes.state_size() + static_cast<int64_t>(n0) * sizes.d_value + p0,
        sizes.d_value, p_columns);
    state.for_each_pair([&](int, int n, int p, float value, float next) {
      if (n < n_columns && p < p_columns) target.store(n, p, value, next);
    });
    sync_block();
  }
}

// ---- passing

template <class T>
struct PassingArgs {
  const float* own;      // (batch, n_heads, n_chunks, d_key, d_value)
  const float* through;  // (batch, n_heads, n_chunks)
  const float* first;    // (batch, n_heads, d_key, d_value) or nullptr
  float* last;           // the same or nullptr
  T* entering;           // like own; the same memory where T is float
  int64_t state_size, n_chunks;
  bool reverse;
};

constexpr int passing_block = 128;
// Chunks whose states a thread asks for before it needs the first: the kernel is all waiting for memory.
constexpr int chunks_ahead = 8;

/// A thread owns N neighbouring elements of one head's state and walks the chunks.
template <class T, int N>
__global__ void pass(PassingArgs<T> args, int64_t blocks_per_head) {
  const int64_t head = blockIdx.x / blocks_per_head;
  const int64_t element = ((blockIdx.x % blocks_per_head) * passing_block + threadIdx.x) * N;
  if (element >= args.state_size) return;
  float state[N];
#pragma unroll
  for (int i = 0; i < N; ++i) state[i] = 0.0f;
  if (args.first != nullptr) load_floats<N>(args.first + head * args.state_size + element, state);
  const auto chunk_at = [&](int64_t step) {
    return head * args.n_chunks + (args.reverse ? args.n_chunks - 1 - step : step);
  };
  for (int64_t step0 = 0; step0 < args.n_chunks; step0 += chunks_ahead) {
    float own[chunks_ahead][N], through[chunks_ahead];
#pragma unroll
    for (int k = 0; k < chunks_ahead; ++k) {
      if (step0 + k < args.n_chunks) {
        const int64_t chunk = chunk_at(step0 + k);
        load_floats<N>(args.own + chunk * args.state_size + element, own[k]);
        through[k] = args.through[chunk];
      }
    }
#pragma unroll
    for (int k = 0; k < chunks_ahead; ++k) {
      if (step0 + k < args.n_chunks) {
        store_floats<N>(args.entering + chunk_at(step0 + k) * args.state_size + element, state);
#pragma unroll
        for (int i = 0; i < N; ++i) state[i] = through[k] * state[i] + own[k][i];
      }
    }
  }
  if (args.last != nullptr) store_floats<N>(args.last + head * args.state_size + element, state);
}

}  // namespace

std::optional<Sizes> plan_sizes(const MatrixStateForwardArgs& args,
                                int64_t (*needed_bytes)(const Sizes&, int element_bytes)) {
  // Longer chunks mean fewer states to pass, which is what takes the time; the CPU's default is not short on purpose.
  constexpr int64_t few_steps = 32;
  const int element_bytes = static_cast<int>(size_of(args.q.dtype()));
  const int64_t available = cuda::properties().shared_bytes_per_block;
  for (const int tile : {tile_size, tile_size / 2, tile_size / 4}) {
    const int64_t chunk_len = args.chunk_len < few_steps ? std::min<int64_t>(args.chunk_len, tile) : tile;
    for (const int key_slice : {2 * tile_size, tile_size}) {
      Sizes sizes{};
      sizes.batch = args.q.dim(0);
      sizes.length = args.q.dim(1);
      sizes.n_groups = static_cast<int>(args.q.dim(2));
      sizes.d_key = static_cast<int>(args.q.dim(3));
      sizes.n_heads = static_cast<int>(args.v.dim(2));
      sizes.d_value = static_cast<int>(args.v.dim(3));
      sizes.chunk_len = static_cast<int>(std::min(chunk_len, sizes.length));
      sizes.n_chunks = blocks_for(sizes.length, sizes.chunk_len);
      sizes.rows = padded(sizes.chunk_len);
      sizes.key_slice = std::min(padded(sizes.d_key), key_slice);
      if (needed_bytes(sizes, element_bytes) <= available) return sizes;
    }
  }
  return std::nullopt;
}

DecayTensors chunk_decays(const MatrixStateForwardArgs& args, const Sizes& sizes) {
  const Device device = args.q.device();
  DecayTensors decays{
      Tensor::empty({sizes.batch, sizes.n_heads, sizes.n_chunks, decay_rows_size}, DType::f32, device),
      Tensor::empty({sizes.batch, sizes.n_heads, sizes.n_chunks}, DType::f32, device),
      Tensor::empty({sizes.batch, sizes.n_chunks, tile_size}, DType::i32, device)};
  const DecayArgs kernel_args{
      args.log_decay.data<float>(), args.log_decay.defined() && args.log_decay.shape().n_axes() == 1,
      args.resets.data<int32_t>(),  decays.rows.data<float>(),
      decays.through.data<float>(), decays.segments.data<int32_t>()};
  const int64_t n_items = sizes.batch * sizes.n_heads * sizes.n_chunks;
  launch("matrix_state_sum_decays", sum_decays,
         {.grid = {blocks_for(n_items, decay_block / warp_size)}, .block = decay_block}, kernel_args, sizes);
  return decays;
}

Tensor chunk_states(const Tensor& keys, const Tensor& values, const Tensor& value_scale,
                    const DecayTensors& decays, Decays::Row factors, const Sizes& sizes) {
  const Tensor states = Tensor::empty(
      {sizes.batch, sizes.n_heads, sizes.n_chunks, sizes.d_key, sizes.d_value}, DType::f32, keys.device());
  dispatch_cuda(keys.dtype(), "chunked_matrix_state", [&](auto element) {
    using T = decltype(element);
    launch("matrix_state_build_states", build_states<T>,
           {.grid = {sizes.batch * sizes.n_chunks * sizes.n_heads * sizes.n_value_slices()},
            .block = tile_block,
            .shared_bytes = shared_bytes<float>(tile_size) + 2 * tile_rows_bytes(sizeof(T))},
           StatesArgs<T>{keys.data<T>(), values.data<T>(), value_scale.data<float>(),
                         decays.rows.data<float>(), factors, states.data<float>()},
           sizes);
  });
  return states;
}

Tensor pass_states(const Tensor& own, const DecayTensors& decays, const Tensor& first, const Tensor& last,
                   DType dtype, bool reverse, const Sizes& sizes) {
  const Tensor entering = dtype == DType::f32 ? own : Tensor::empty(own.shape(), dtype, own.device());
  const int64_t n_heads = sizes.batch * sizes.n_heads;
  dispatch_cuda(dtype, "chunked_matrix_state", [&](auto element) {
    using T = decltype(element);
    const PassingArgs<T> args{
        own.data<float>(),  decays.through.data<float>(), first.data<float>(), last.data<float>(),
        entering.data<T>(), sizes.state_size(),           sizes.n_chunks,      reverse};
    dispatch_packing(can_pack(sizes.state_size(), {args.first, args.last}), [&](auto packing) {
      constexpr int N = packing;
      const int64_t blocks_per_head = blocks_for(sizes.state_size(), passing_block * N);
      launch("matrix_state_pass", pass<T, N>, {.grid = {n_heads * blocks_per_head}, .block = passing_block},
             args, blocks_per_head);
    });
  });
  return entering;
}

}  // namespace headwater::matrix_state
