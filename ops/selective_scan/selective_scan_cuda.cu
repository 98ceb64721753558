#include <algorithm>
#include <utility>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/partial_sums.h"
#include "ops/selective_scan/selective_scan_kernels.h"

// A warp owns 32 neighbouring channels of one group and a chunk of time, a lane each; neighbours read neighbours. It
// walks the chunk in stretches of 8 steps. Of a stretch a lane keeps dt', x and the like in registers, and takes one
// state n after the other through all 8 steps, so that any d_state will do. Between stretches the state is in global
// memory, in `carries`, where only its own lane touches it.
//
// Chunks are what makes a long sequence parallel. Over a chunk the recurrence is h -> exp(A sum of dt') h + local, with
// `local` the final state from zero (decays of a chunk multiply: a sum of dt' stands for them, and nothing is ever
// divided by a product of decays). So: every chunk computes its local state; the chunks are combined in order, which
// gives the state before each; every chunk runs again from that. The gradient of the state goes the same way backwards.
//
// Letters: b sequence, t step, k step of a stretch, n state, d channel, v = dt' x, as in selective_scan.cpp.

namespace headwater {
namespace {

constexpr int block = 128;
constexpr int steps = selective_scan_stretch_cuda;

struct Sizes {
  int64_t batch, length, d_inner, d_state, n_groups;
  int64_t group_size, warps_per_group;  // of channels
  int64_t chunk_len, n_chunks;          // chunk_len is a multiple of `steps`
  bool softplus;

  int64_t n_warps() const { return batch * n_chunks * n_groups * warps_per_group; }
  int64_t n_states() const { return batch * d_state * d_inner; }
};

/// The shape alone cuts time into chunks: as many as fill a GPU with warps, at most 64, as they are combined one after
/// the other.
Sizes sizes_of(const SelectiveScanForwardArgs& args) {
  constexpr int64_t warps_wanted = 4096, most_chunks = 64;
  Sizes sizes{};
  sizes.batch = args.x.dim(0);
  sizes.length = args.x.dim(1);
  sizes.d_inner = args.x.dim(2);
  sizes.d_state = args.A.dim(1);
  sizes.n_groups = args.B.dim(2);
  sizes.softplus = args.softplus;
  sizes.group_size = sizes.d_inner / sizes.n_groups;
  sizes.warps_per_group = blocks_for(sizes.group_size, warp_size);
  const int64_t n_stretches = blocks_for(sizes.length, steps);
  const int64_t wanted = std::clamp<int64_t>(
      warps_wanted / std::max<int64_t>(1, sizes.batch * sizes.n_groups * sizes.warps_per_group), 1,
      most_chunks);
  sizes.chunk_len = blocks_for(n_stretches, wanted) * steps;
  sizes.n_chunks = blocks_for(sizes.length, sizes.chunk_len);
  return sizes;
}

/// Pointers may be null: D, z, dt_bias, resets.
template <class T>
struct Inputs {
  const T *x, *dt;
  const float* A;
  const T *B, *C;
  const float* D;
  const T* z;
  const float* dt_bias;
  const int32_t* resets;
};

template <class T>
Inputs<T> inputs_of(const SelectiveScanForwardArgs& args) {
  return {args.x.data<T>(), args.dt.data<T>(),          args.A.data<float>(),
          args.B.data<T>(), args.C.data<T>(),           args.D.data<float>(),
          args.z.data<T>(), args.dt_bias.data<float>(), args.resets.data<int32_t>()};
}

/// What a warp owns, and a lane of it. Lanes beyond the group's end compute with zeros and write nothing.
struct Place {
  int64_t b, chunk, group, warp_in_group, d;
  int64_t begin, end;  // the chunk's steps
  bool has_channel, has_work;

  __device__ explicit Place(const Sizes& sizes) {
    int64_t warp = static_cast<int64_t>(blockIdx.x) * n_warps() + warp_index();
    has_work = warp < sizes.batch * sizes.n_chunks * sizes.n_groups * sizes.warps_per_group;
    warp_in_group = warp % sizes.warps_per_group;
    warp /= sizes.warps_per_group;
    group = warp % sizes.n_groups;
    warp /= sizes.n_groups;
    chunk = warp % sizes.n_chunks;
    b = warp / sizes.n_chunks;
    const int64_t in_group = warp_in_group * warp_size + lane_index();
    has_channel = in_group < sizes.group_size;
    d = group * sizes.group_size + (has_channel ? in_group : 0);
    begin = chunk * sizes.chunk_len;
    end = begin + sizes.chunk_len < sizes.length ? begin + sizes.chunk_len : sizes.length;
  }

  __device__ int64_t last_stretch() const { return begin + (end - begin - 1) / steps * steps; }
  /// Of the lane's channel in a (batch, length, d_inner) tensor.
  __device__ int64_t offset(const Sizes& sizes, int64_t t) const {
    return (b * sizes.length + t) * sizes.d_inner + d;
  }
  /// Of the group's first state at step t of B and C.
  __device__ int64_t map(const Sizes& sizes, int64_t t) const {
    return ((b * sizes.length + t) * sizes.n_groups + group) * sizes.d_state;
  }
  /// Of the lane's channel and state 0 in (batch, n_chunks, d_state, d_inner).
  __device__ int64_t carry(const Sizes& sizes) const {
    return (b * sizes.n_chunks + chunk) * sizes.d_state * sizes.d_inner + d;
  }
  /// Of the lane's channel in (batch, n_chunks, d_inner).
  __device__ int64_t chunk_row(const Sizes& sizes) const {
    return (b * sizes.n_chunks + chunk) * sizes.d_inner + d;
  }
};

/// The steps of a stretch that exist: from t on, n of them, none in a lane without a channel. All others are the
/// identity: dt' = x = g = 0. Pointers walk from step to step: an address for each would take registers.
struct Steps {
  int64_t t, offset, map;
  int n, n_of_lane;
  uint32_t starts;  // bit k: a document starts at step k

  template <class T>
  __device__ Steps(const Inputs<T>& in, const Sizes& sizes, const Place& place, int64_t first)
      : t(first),
        offset(place.offset(sizes, first)),
        map(place.map(sizes, first)),
        n(place.end - first < steps ? static_cast<int>(place.end - first) : steps),
        n_of_lane(place.has_channel ? n : 0),
        starts(0) {
    if (in.resets == nullptr) return;
    const int32_t* resets = in.resets + place.b * sizes.length + first;
    for (int k = 0; k < n; ++k) starts |= (resets[k] != 0 ? 1u : 0u) << k;
  }

  __device__ bool start(int k) const { return (starts >> k & 1u) != 0; }

  template <class T>
  __device__ void load(const T* from, const Sizes& sizes, float (&values)[steps]) const {
    from += offset;
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      values[k] = k < n_of_lane ? to_float(*from) : 0.0f;
      from += sizes.d_inner;
    }
  }
  template <class T>
  __device__ void store(const float (&values)[steps], const Sizes& sizes, T* to) const {
    to += offset;
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      if (k < n_of_lane) *to = from_float<T>(values[k]);
      to += sizes.d_inner;
    }
  }
  /// Entry `state` of B or C at every step.
  template <class T>
  __device__ __forceinline__ void load_entries(const T* maps, const Sizes& sizes, int64_t state,
                                               float (&values)[steps]) const {
    const int64_t row = sizes.n_groups * sizes.d_state;
    const T* from = maps + map + state;
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      values[k] = k < n ? to_float(*from) : 0.0f;
      from += row;
    }
  }
};

template <class T>
__device__ void load_step_sizes(const Inputs<T>& in, const Sizes& sizes, const Place& place, const Steps& at,
                                float (&dt)[steps]) {
  const float bias = in.dt_bias != nullptr ? in.dt_bias[place.d] : 0.0f;
  at.load(in.dt, sizes, dt);
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    const float p = dt[k] + bias;
    dt[k] = k < at.n_of_lane ? (sizes.softplus ? softplus_of(p) : p) : 0.0f;
  }
}

/// g = grad_y silu(z).
template <class T>
__device__ void load_gradients(const Inputs<T>& in, const T* grad_y, const Sizes& sizes, const Steps& at,
                               float (&g)[steps]) {
  at.load(grad_y, sizes, g);
  if (in.z == nullptr) return;
  float z[steps];
  at.load(in.z, sizes, z);
#pragma unroll
  for (int k = 0; k < steps; ++k) g[k] *= silu_of(z[k]);
}

/// What a chunk that a document starts in says instead of its sum of step sizes: it decays by 0.
constexpr float cut = 3.0e38f;

__device__ float decay_of(float dt_sum, float A) {
  return dt_sum >= cut ? 0.0f : expf(dt_sum * A);
}

/// Writes every chunk's local state to `carries` (batch, n_chunks, d_state, d_inner) and its sum of step sizes, or
/// `cut`, to `dt_sums` (batch, n_chunks, d_inner). Warps as above.
template <class T>
__global__ void __launch_bounds__(block, 4)
    local_states(Inputs<T> in, float* carries, float* dt_sums, Sizes sizes) {
  const Place place(sizes);
  if (!place.has_work || !place.has_channel) return;
  float dt_sum = 0.0f;
  carries += place.carry(sizes);
  for (int64_t t = place.begin; t < place.end; t += steps) {
    const Steps at(in, sizes, place, t);
    float dt[steps], v[steps];
    load_step_sizes(in, sizes, place, at, dt);
    at.load(in.x, sizes, v);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      v[k] *= dt[k];
      dt_sum += dt[k];
    }
    if (at.starts != 0) dt_sum = cut;
    for (int64_t n = 0; n < sizes.d_state; ++n) {
      const float A = in.A[place.d * sizes.d_state + n];
      float h = t == place.begin ? 0.0f : carries[n * sizes.d_inner];
      float B[steps];
      at.load_entries(in.B, sizes, n, B);
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        const float input = v[k] * B[k];
        h = at.start(k) ? input : expf(dt[k] * A) * h + input;
      }
      carries[n * sizes.d_inner] = h;
    }
  }
  dt_sums[place.chunk_row(sizes)] = dt_sum < cut ? dt_sum : cut;
}

/// The same backwards: what each chunk adds to the gradient of the state before it, if nothing comes from behind.
template <class T>
__global__ void __launch_bounds__(block, 4)
    local_gradients(Inputs<T> in, const T* grad_y, float* carries, float* dt_sums, Sizes sizes) {
  const Place place(sizes);
  if (!place.has_work || !place.has_channel) return;
  float dt_sum = 0.0f;
  carries += place.carry(sizes);
  for (int64_t t = place.last_stretch(); t >= place.begin; t -= steps) {
    const Steps at(in, sizes, place, t);
    float dt[steps], g[steps];
    load_step_sizes(in, sizes, place, at, dt);
    load_gradients(in, grad_y, sizes, at, g);
#pragma unroll
    for (int k = 0; k < steps; ++k) dt_sum += dt[k];
    if (at.starts != 0) dt_sum = cut;
    for (int64_t n = 0; n < sizes.d_state; ++n) {
      const float A = in.A[place.d * sizes.d_state + n];
      float carry = t == place.last_stretch() ? 0.0f : carries[n * sizes.d_inner];
      float C[steps];
      at.load_entries(in.C, sizes, n, C);
#pragma unroll
      for (int k = steps - 1; k >= 0; --k) {
        const float gh = C[k] * g[k] + carry;
        carry = at.start(k) ? 0.0f : expf(dt[k] * A) * gh;
      }
      carries[n * sizes.d_inner] = carry;
    }
  }
  dt_sums[place.chunk_row(sizes)] = dt_sum < cut ? dt_sum : cut;
}

/// One thread one state of one channel, channels first: replaces every chunk's local state in `carries` by what comes
/// into the chunk, in the order of time or, `backwards`, against it. `incoming`, into the first of them, is
/// (batch, d_inner, d_state) or null, for zero. With a single chunk nothing local is read.
__global__ void combine_chunks(const float* A, const float* incoming, const float* dt_sums, float* carries,
                               Sizes sizes, bool backwards) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= sizes.batch * sizes.d_state * sizes.d_inner) return;
  const int64_t d = thread % sizes.d_inner;
  const int64_t n = thread / sizes.d_inner % sizes.d_state;
  const int64_t b = thread / sizes.d_inner / sizes.d_state;
  const float rate = A[d * sizes.d_state + n];
  float state = incoming != nullptr ? incoming[(b * sizes.d_inner + d) * sizes.d_state + n] : 0.0f;
  for (int64_t i = 0; i < sizes.n_chunks; ++i) {
    const int64_t chunk = b * sizes.n_chunks + (backwards ? sizes.n_chunks - 1 - i : i);
    float& carry = carries[(chunk * sizes.d_state + n) * sizes.d_inner + d];
    if (i + 1 == sizes.n_chunks) {
      carry = state;
      return;
    }
    const float local = carry;
    carry = state;
    const float decay = decay_of(dt_sums[chunk * sizes.d_inner + d], rate);
    state = decay == 0.0f ? local : decay * state + local;
  }
}

/// The forward of every chunk, from the state before it in `carries`. Warps as above. `saved_states`, or null:
/// (batch, stretches, d_state, d_inner).
template <class T>
__global__ void __launch_bounds__(block, 4)
    forward_chunks(Inputs<T> in, float* carries, T* y, float* final_state, float* saved_states, Sizes sizes) {
  const Place place(sizes);
  if (!place.has_work || !place.has_channel) return;
  const float D = in.D != nullptr ? in.D[place.d] : 0.0f;
  const int64_t n_stretches = (sizes.length + steps - 1) / steps;
  carries += place.carry(sizes);
  for (int64_t t = place.begin; t < place.end; t += steps) {
    const Steps at(in, sizes, place, t);
    float dt[steps], v[steps], s[steps];
    load_step_sizes(in, sizes, place, at, dt);
    at.load(in.x, sizes, v);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      s[k] = D * v[k];
      v[k] *= dt[k];
    }
    const int64_t saved = (place.b * n_stretches + t / steps) * sizes.d_state * sizes.d_inner + place.d;
    for (int64_t n = 0; n < sizes.d_state; ++n) {
      const float A = in.A[place.d * sizes.d_state + n];
      float h = carries[n * sizes.d_inner];
      if (saved_states != nullptr) saved_states[saved + n * sizes.d_inner] = h;
      float B[steps], C[steps];
      at.load_entries(in.B, sizes, n, B);
      at.load_entries(in.C, sizes, n, C);
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        const float input = v[k] * B[k];
        h = at.start(k) ? input : expf(dt[k] * A) * h + input;
        s[k] += C[k] * h;
      }
      carries[n * sizes.d_inner] = h;
      if (t + steps >= sizes.length) final_state[(place.b * sizes.d_inner + place.d) * sizes.d_state + n] = h;
    }
    if (in.z != nullptr) {
      float z[steps];
      at.load(in.z, sizes, z);
#pragma unroll
      for (int k = 0; k < steps; ++k) s[k] *= silu_of(z[k]);
    }
    at.store(s, sizes, y);
  }
}

/// Lanes whose number differs in the bit `half` exchange halves of the first 2 half values, and add what they keep.
template <int half>
__device__ __forceinline__ void exchange_halves(float (&values)[steps]) {
  const bool upper = (lane_index() & half) != 0;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float given = upper ? values[i] : values[i + half];
    const float kept = upper ? values[i + half] : values[i];
    values[i] = kept + shuffle_xor(given, half);
  }
  if constexpr (half > 1) exchange_halves<half / 2>(values);
}

/// The sums over the warp of each of 8 values: that of values[lane % 8], in every lane. Halving what a lane keeps while the
/// sums grow takes about one exchange for each value.
__device__ __forceinline__ float sums_over_lanes(float (&values)[steps]) {
  exchange_halves<steps / 2>(values);
  float sum = values[0];
#pragma unroll
  for (int mask = steps; mask < warp_size; mask *= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

template <class T>
struct Gradients {
  const T* grad_y;
  T *grad_x, *grad_dt;
  T* grad_z;                  // null without z
  float* grad_initial_state;  // or null
  // Sums of one warp. Of B and C: (warps_per_group, batch, n_groups, d_state, length).
  float *B, *C;
  // Of one chunk: (batch, n_chunks, d_state, d_inner); (batch, n_chunks, d_inner).
  float *A, *D, *dt_bias;
};

/// The backward of every chunk, from the gradient of the state behind it in `carries`. Warps as above; all lanes take
/// part to the end, for the sums over channels. What follows the states reads x, z, dt and grad_y a second time:
/// registers are what is short, and two blocks to a multiprocessor what they allow without spilling.
template <class T>
__global__ void __launch_bounds__(block, 2)
    backward_chunks(Inputs<T> in, Gradients<T> gradients, const float* saved_states, float* carries,
                    Sizes sizes) {
  const Place place(sizes);
  if (!place.has_work) return;
  const bool has_channel = place.has_channel;
  const float D = in.D != nullptr && has_channel ? in.D[place.d] : 0.0f;
  const int64_t n_stretches = (sizes.length + steps - 1) / steps;
  float grad_D = 0.0f, grad_dt_bias = 0.0f;
  float* grad_A = gradients.A + place.carry(sizes);
  carries += place.carry(sizes);
  for (int64_t t = place.last_stretch(); t >= place.begin; t -= steps) {
    const Steps at(in, sizes, place, t);
    float dt[steps], v[steps], g[steps], s[steps], grad_v[steps], grad_dt[steps];
    load_step_sizes(in, sizes, place, at, dt);
    at.load(in.x, sizes, v);
    load_gradients(in, gradients.grad_y, sizes, at, g);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      s[k] = D * v[k];
      v[k] *= dt[k];
      grad_v[k] = grad_dt[k] = 0.0f;
    }
    const int64_t saved = (place.b * n_stretches + t / steps) * sizes.d_state * sizes.d_inner + place.d;
    for (int64_t n = 0; n < sizes.d_state; ++n) {
      const float A = has_channel ? in.A[place.d * sizes.d_state + n] : 0.0f;
      const float before = has_channel ? saved_states[saved + n * sizes.d_inner] : 0.0f;
      float carry = has_channel ? carries[n * sizes.d_inner] : 0.0f;
      float decay[steps], h[steps], B[steps], C[steps];
      at.load_entries(in.B, sizes, n, B);
      at.load_entries(in.C, sizes, n, C);
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        const float input = v[k] * B[k];
        decay[k] = expf(dt[k] * A);
        h[k] = at.start(k) ? input : decay[k] * (k > 0 ? h[k - 1] : before) + input;
        s[k] += C[k] * h[k];
      }
      float sum_A = 0.0f;
#pragma unroll
      for (int k = steps - 1; k >= 0; --k) {
        const float gh = C[k] * g[k] + carry;
        carry = at.start(k) ? 0.0f : decay[k] * gh;
        const float gh_r = at.start(k) ? 0.0f : carry * (k > 0 ? h[k - 1] : before);
        grad_v[k] += gh * B[k];
        grad_dt[k] += gh_r * A;
        sum_A += gh_r * dt[k];
        // From here on these hold the lane's part of the gradients of B and C.
        decay[k] = gh * v[k];
        h[k] *= g[k];
      }
      if (has_channel) {
        carries[n * sizes.d_inner] = carry;
        const float later = t == place.last_stretch() ? 0.0f : grad_A[n * sizes.d_inner];
        grad_A[n * sizes.d_inner] = later + sum_A;
        if (t == 0 && gradients.grad_initial_state != nullptr)
          gradients.grad_initial_state[(place.b * sizes.d_inner + place.d) * sizes.d_state + n] = carry;
      }
      const float to_B = sums_over_lanes(decay), to_C = sums_over_lanes(h);
      const int64_t row =
          ((place.warp_in_group * sizes.batch + place.b) * sizes.n_groups + place.group) * sizes.d_state + n;
      if (lane_index() < at.n) {
        gradients.B[row * sizes.length + t + lane_index()] = to_B;
        gradients.C[row * sizes.length + t + lane_index()] = to_C;
      }
    }
    float x[steps];
    at.load(in.x, sizes, x);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      grad_dt[k] += x[k] * grad_v[k];
      grad_v[k] = D * g[k] + dt[k] * grad_v[k];
      grad_D += g[k] * x[k];
    }
    at.store(grad_v, sizes, gradients.grad_x);
    if (sizes.softplus) {
      const float bias = in.dt_bias != nullptr ? in.dt_bias[place.d] : 0.0f;
      at.load(in.dt, sizes, x);
#pragma unroll
      for (int k = 0; k < steps; ++k) grad_dt[k] *= sigmoid_of(x[k] + bias);
    }
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      // A step that does not exist keeps the state, so that its dt' has a gradient like any other's.
      if (k < at.n_of_lane) grad_dt_bias += grad_dt[k];
    }
    at.store(grad_dt, sizes, gradients.grad_dt);
    if (in.z != nullptr) {
      at.load(in.z, sizes, x);
      at.load(gradients.grad_y, sizes, g);
#pragma unroll
      for (int k = 0; k < steps; ++k) g[k] *= s[k] * silu_slope(x[k]);
      at.store(g, sizes, gradients.grad_z);
    }
  }
  if (!has_channel) return;
  gradients.D[place.chunk_row(sizes)] = grad_D;
  gradients.dt_bias[place.chunk_row(sizes)] = grad_dt_bias;
}

/// target[b, column, group, row] = sum over parts, in order, of partials[part, b, group, row, column]. One thread a number
/// of a partial, columns first: neighbours read neighbours.
template <class T>
__global__ void sum_transposed(const float* partials, int64_t n_parts, int64_t batch, int64_t n_groups,
                               int64_t n_rows, int64_t n_columns, T* target) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t size = batch * n_groups * n_rows * n_columns;
  if (thread >= size) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < n_parts; ++part) sum += partials[part * size + thread];
  const int64_t column = thread % n_columns, row = thread / n_columns % n_rows;
  const int64_t outer = thread / n_columns / n_rows;
  const int64_t b = outer / n_groups, group = outer % n_groups;
  target[((b * n_columns + column) * n_groups + group) * n_rows + row] = from_float<T>(sum);
}

LaunchShape one_thread_each(int64_t n_threads) {
  return {.grid = {blocks_for(n_threads, block)}, .block = block};
}

/// Room for what is handed from chunk to chunk.
struct Carries {
  Carries(const Sizes& sizes, Device device)
      : states(
            Tensor::empty({sizes.batch, sizes.n_chunks, sizes.d_state, sizes.d_inner}, DType::f32, device)),
        dt_sums(Tensor::empty({sizes.batch, sizes.n_chunks, sizes.d_inner}, DType::f32, device)) {}
  Tensor states, dt_sums;
};

template <class T>
void forward(const SelectiveScanForwardArgs& args) {
  const Sizes sizes = sizes_of(args);
  const Inputs<T> in = inputs_of<T>(args);
  const Carries carries(sizes, args.x.device());
  float* states = carries.states.data<float>();
  float* dt_sums = carries.dt_sums.data<float>();
  const LaunchShape warps = one_thread_each(sizes.n_warps() * warp_size);
  if (sizes.n_chunks > 1)
    launch("selective_scan_local_states", local_states<T>, warps, in, states, dt_sums, sizes);
  launch("selective_scan_combine", combine_chunks, one_thread_each(sizes.n_states()), in.A,
         args.initial_state.data<float>(), dt_sums, states, sizes, false);
  launch("selective_scan_forward", forward_chunks<T>, warps, in, states, args.y.data<T>(),
         args.final_state.data<float>(), args.saved_states.data<float>(), sizes);
}

template <class T>
void backward(const SelectiveScanBackwardArgs& args) {
  const Sizes sizes = sizes_of(args.forward);
  const Inputs<T> in = inputs_of<T>(args.forward);
  const Device device = args.grad_y.device();
  const Carries carries(sizes, device);
  float* states = carries.states.data<float>();
  float* dt_sums = carries.dt_sums.data<float>();
  const int64_t n_maps = args.grad_B.numel();
  const Tensor B_sums = Tensor::empty({sizes.warps_per_group, n_maps}, DType::f32, device);
  const Tensor C_sums = Tensor::empty({sizes.warps_per_group, n_maps}, DType::f32, device);
  const int64_t n_rows = sizes.batch * sizes.n_chunks;
  const Tensor A_sums = Tensor::empty({n_rows, sizes.d_state * sizes.d_inner}, DType::f32, device);
  const Tensor D_sums = Tensor::empty({n_rows, sizes.d_inner}, DType::f32, device);
  const Tensor dt_bias_sums = Tensor::empty({n_rows, sizes.d_inner}, DType::f32, device);
  const Gradients<T> gradients{.grad_y = args.grad_y.data<T>(),
                               .grad_x = args.grad_x.data<T>(),
                               .grad_dt = args.grad_dt.data<T>(),
                               .grad_z = args.grad_z.data<T>(),
                               .grad_initial_state = args.grad_initial_state.data<float>(),
                               .B = B_sums.data<float>(),
                               .C = C_sums.data<float>(),
                               .A = A_sums.data<float>(),
                               .D = D_sums.data<float>(),
                               .dt_bias = dt_bias_sums.data<float>()};
  const LaunchShape warps = one_thread_each(sizes.n_warps() * warp_size);
  if (sizes.n_chunks > 1)
    launch("selective_scan_local_gradients", local_gradients<T>, warps, in, gradients.grad_y, states, dt_sums,
           sizes);
  launch("selective_scan_combine", combine_chunks, one_thread_each(sizes.n_states()), in.A,
         args.grad_final_state.data<float>(), dt_sums, states, sizes, true);
  launch("selective_scan_backward", backward_chunks<T>, warps, in, gradients,
         args.forward.saved_states.data<float>(), states, sizes);

  for (const auto& [sums, target] : {std::pair{B_sums, args.grad_B}, std::pair{C_sums, args.grad_C}}) {
    launch("selective_scan_sum_maps", sum_transposed<T>, one_thread_each(n_maps), sums.template data<float>(),
           sizes.warps_per_group, sizes.batch, sizes.n_groups, sizes.d_state, sizes.length,
           target.template data<T>());
  }
  if (args.grad_A.defined()) {
    launch("selective_scan_sum_A", sum_transposed<float>, one_thread_each(args.grad_A.numel()),
           A_sums.data<float>(), n_rows, int64_t{1}, int64_t{1}, sizes.d_state, sizes.d_inner,
           args.grad_A.data<float>());
  }
  sum_partials_cuda(D_sums, args.grad_D, false);
  sum_partials_cuda(dt_bias_sums, args.grad_dt_bias, false);
}

}  // namespace

void selective_scan_forward_cuda(const SelectiveScanForwardArgs& args) {
  dispatch_cuda(args.x.dtype(), "selective_scan", [&](auto element) { forward<decltype(element)>(args); });
}

void selective_scan_backward_cuda(const SelectiveScanBackwardArgs& args) {
  dispatch_cuda(args.forward.x.dtype(), "selective_scan",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
