// The definition, step by step: the form that decodes, the oracle of the chunked one, and what is left where states are
// too wide for tiles. No size is limited: states stay in global memory, where every element has one thread.

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/chunked_matrix_state/chunked_matrix_state_kernels.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"

namespace headwater {
namespace {

/// Indices: b sequence, t step, h head, n key channel, p value channel.
template <class T>
struct Inputs {
  const T *q, *k;              // (batch, length, n_groups, d_key)
  const T* v;                  // (batch, length, n_heads, d_value)
  const float* log_decay;      // nullptr: none
  bool constant_decay;         // (n_heads), else (batch, length, n_heads)
  const float* value_scale;    // (batch, length, n_heads) or nullptr
  const float* skip;           // nullptr: none
  bool skip_per_channel;       // (n_heads, d_value), else (n_heads)
  const float* initial_state;  // (batch, n_heads, d_key, d_value) or nullptr
  const int32_t* resets;       // (batch, length) or nullptr
  int64_t length, n_groups, d_key, n_heads, d_value;

  explicit Inputs(const MatrixStateForwardArgs& args)
      : q(args.q.data<T>()),
        k(args.k.data<T>()),
        v(args.v.data<T>()),
        log_decay(args.log_decay.data<float>()),
        constant_decay(args.log_decay.defined() && args.log_decay.shape().n_axes() == 1),
        value_scale(args.value_scale.data<float>()),
        skip(args.skip.data<float>()),
        skip_per_channel(args.skip.defined() && args.skip.shape().n_axes() == 2),
        initial_state(args.initial_state.data<float>()),
        resets(args.resets.data<int32_t>()),
        length(args.q.dim(1)),
        n_groups(args.q.dim(2)),
        d_key(args.q.dim(3)),
        n_heads(args.v.dim(2)),
        d_value(args.v.dim(3)) {}

  __device__ int64_t step_at(int64_t b, int64_t t, int64_t h) const { return (b * length + t) * n_heads + h; }
  __device__ int64_t value_at(int64_t b, int64_t t, int64_t h) const { return step_at(b, t, h) * d_value; }
  __device__ int64_t key_at(int64_t b, int64_t t, int64_t h) const {
    return ((b * length + t) * n_groups + h / (n_heads / n_groups)) * d_key;
  }
  __device__ bool is_reset(int64_t b, int64_t t) const {
    return resets != nullptr && resets[b * length + t] != 0;
  }
  /// 0 where a document starts.
  __device__ float decay(int64_t b, int64_t t, int64_t h) const {
    if (is_reset(b, t)) return 0.0f;
    return log_decay == nullptr ? 1.0f : expf(log_decay[constant_decay ? h : step_at(b, t, h)]);
  }
  __device__ float scale(int64_t b, int64_t t, int64_t h) const {
    return value_scale == nullptr ? 1.0f : value_scale[step_at(b, t, h)];
  }
  __device__ float skip_at(int64_t h, int64_t p) const {
    return skip == nullptr ? 0.0f : skip[skip_per_channel ? h * d_value + p : h];
  }
};

constexpr int forward_block = 128;
constexpr int forward_columns = 32;  // value channels of a block

/// A block owns 32 value channels of one head's state, in final_state; a thread N neighbouring ones, in every
/// (4 N)-th row. One step reads and writes each element once, which is all the time that decoding takes; over several
/// steps the 32 columns stay in the first-level cache. Shared: each thread's N sums for y.
template <class T, int N>
__global__ void forward(Inputs<T> in, T* y, float* final_state, int64_t n_slices) {
  constexpr int threads_per_row = forward_columns / N, n_rows = forward_block / threads_per_row;
  SharedMemory shared;
  const SharedArray<float> sums = shared.array<float>(forward_block * N);
  const int64_t head = blockIdx.x / n_slices, b = head / in.n_heads, h = head % in.n_heads;
  const int thread = static_cast<int>(threadIdx.x), row = thread / threads_per_row;
  const int64_t p = blockIdx.x % n_slices * forward_columns + thread % threads_per_row * N;
  const bool inside = p < in.d_value;
  const int64_t state_offset = head * in.d_key * in.d_value;
  float* state = final_state + state_offset;
  for (int64_t t = 0; t < in.length; ++t) {
    const float decay = in.decay(b, t, h), scale = in.scale(b, t, h);
    const float* previous = t > 0                         ? state
                            : in.initial_state != nullptr ? in.initial_state + state_offset
                                                          : nullptr;
    float v[N], result[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = result[i] = 0.0f;
    if (inside) {
      const T *q = in.q + in.key_at(b, t, h), *k = in.k + in.key_at(b, t, h);
      load_floats<N>(in.v + in.value_at(b, t, h) + p, v);
#pragma unroll 4
      for (int64_t n = row; n < in.d_key; n += n_rows) {
        float element[N];
#pragma unroll
        for (int i = 0; i < N; ++i) element[i] = 0.0f;
        if (previous != nullptr) load_floats<N>(previous + n * in.d_value + p, element);
        const float query = to_float(q[n]), key = to_float(k[n]) * scale;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          element[i] = decay * element[i] + key * v[i];
          result[i] += query * element[i];
        }
        store_floats<N>(state + n * in.d_value + p, element);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sums[thread * N + i] = result[i];
    sync_block();
    if (row == 0 && inside) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        result[i] = in.skip_at(h, p + i) * v[i];
        for (int other = 0; other < n_rows; ++other) {
          result[i] += sums[(other * threads_per_row + thread) * N + i];
        }
      }
      store_floats<N>(y + in.value_at(b, t, h) + p, result);
    }
    sync_block();
  }
}

// ---- backward: right, and no more. Two sweeps as on the CPU, in double precision.

constexpr int backward_block = 256;
constexpr int backward_warps = backward_block / warp_size;

/// Null where a gradient is not wanted.
template <class T>
struct Outputs {
  const T* grad_y;                // like v
  const float* grad_final_state;  // (batch, n_heads, d_key, d_value) or nullptr
  T* grad_v;
  float *grad_value_scale, *grad_log_decay;  // (batch, length, n_heads)
  float* decay_sums;                         // (batch, n_heads)
  float* skip_sums;                          // (batch, n_heads, d_value or 1)
  float* grad_initial_state;                 // (batch, n_heads, d_key, d_value)
  float *grad_q, *grad_k;                    // (batch, length, n_heads, d_key): of each head by itself
};

/// Working memory of all heads: each has a stretch of every array.
struct Work {
  double *state, *grad_state;  // (batch, n_heads, d_key, d_value)
  double* balance;             // (batch, n_heads, length, warps): q.grad_q of each warp's rows
  double* columns;  // (batch, n_heads, warps + 1, d_value): each warp's part of grad_u; last, of grad_skip
};

/// The sum over the warp's lanes, in every lane.
__device__ double sum_lanes(double value) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

/// The sum over the block's threads, in every thread. `scratch` may be used again at once.
__device__ double sum_block(double value, const SharedArray<double>& scratch) {
  value = sum_lanes(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  double sum = 0.0;
  for (int warp = 0; warp < backward_warps; ++warp) sum += scratch[warp];
  sync_block();
  return sum;
}

/// One head of one sequence. A warp owns every eighth row of the states, a lane every 32nd element of a row.
template <class T>
struct HeadSweeps {
  const Inputs<T>& in;
  const Outputs<T>& out;
  const Work& work;
  int64_t b, h, head;
  SharedArray<double> scratch, balances;

  __device__ int64_t state_at(int64_t n) const { return (head * in.d_key + n) * in.d_value; }
  __device__ double* columns(int warp) const {
    return work.columns + (head * (backward_warps + 1) + warp) * in.d_value;
  }

  __device__ void forwards(int64_t t) const {
    const double decay = in.decay(b, t, h), scale = in.scale(b, t, h);
    const T *v = in.v + in.value_at(b, t, h), *g = out.grad_y + in.value_at(b, t, h);
    double balance = 0.0;
    for (int64_t n = warp_index(); n < in.d_key; n += backward_warps) {
      const double q = to_float(in.q[in.key_at(b, t, h) + n]),
                   key = scale * to_float(in.k[in.key_at(b, t, h) + n]);
      double* row = work.state + state_at(n);
      double grad_q = 0.0;
      for (int64_t p = lane_index(); p < in.d_value; p += warp_size) {
        const double initial = in.initial_state != nullptr ? in.initial_state[state_at(n) + p] : 0.0;
        const double previous = t > 0 ? row[p] : initial;
        row[p] = decay * previous + key * to_float(v[p]);
        grad_q += row[p] * to_float(g[p]);
      }
      grad_q = sum_lanes(grad_q);
      balance += q * grad_q;
      if (lane_index() == 0) out.grad_q[in.step_at(b, t, h) * in.d_key + n] = static_cast<float>(grad_q);
    }
    if (lane_index() == 0) work.balance[(head * in.length + t) * backward_warps + warp_index()] = balance;
  }

  /// The gradient of the final state; gives the thread's part of <S, dS>.
  __device__ double start_backwards() const {
    double product = 0.0;
    for (int64_t n = warp_index(); n < in.d_key; n += backward_warps) {
      for (int64_t p = lane_index(); p < in.d_value; p += warp_size) {
        const int64_t at = state_at(n) + p;
        work.grad_state[at] = out.grad_final_state != nullptr ? out.grad_final_state[at] : 0.0;
        product += work.grad_state[at] * work.state[at];
      }
    }
    for (int64_t p = threadIdx.x; p < in.d_value; p += backward_block) columns(backward_warps)[p] = 0.0;
    return product;
  }

  /// grad_k, each warp's part of grad_u, and dS for the step before. balances[warp] = sum of q grad_q - k grad_k.
  __device__ void backwards(int64_t t) const {
    const double decay = in.decay(b, t, h), scale = in.scale(b, t, h);
    const T *v = in.v + in.value_at(b, t, h), *g = out.grad_y + in.value_at(b, t, h);
    double* grad_u = columns(warp_index());
    for (int64_t p = lane_index(); p < in.d_value; p += warp_size) grad_u[p] = 0.0;
    double balance = work.balance[(head * in.length + t) * backward_warps + warp_index()];
    for (int64_t n = warp_index(); n < in.d_key; n += backward_warps) {
      const double q = to_float(in.q[in.key_at(b, t, h) + n]), k = to_float(in.k[in.key_at(b, t, h) + n]);
      double* row = work.grad_state + state_at(n);
      double grad_k = 0.0;
      for (int64_t p = lane_index(); p < in.d_value; p += warp_size) {
        const double grad = row[p] + q * to_float(g[p]);
        grad_k += grad * scale * to_float(v[p]);
        grad_u[p] += grad * k;
        row[p] = decay * grad;
      }
      grad_k = sum_lanes(grad_k);
      balance -= k * grad_k;
      if (lane_index() == 0) out.grad_k[in.step_at(b, t, h) * in.d_key + n] = static_cast<float>(grad_k);
    }
    if (lane_index() == 0) balances[warp_index()] = balance;
  }

  /// From the parts of grad_u: grad_v, grad_value_scale, and the sums for grad_skip.
  __device__ void write_values(int64_t t) const {
    const double scale = in.scale(b, t, h);
    const int64_t at = in.value_at(b, t, h);
    double grad_scale = 0.0;
    for (int64_t p = threadIdx.x; p < in.d_value; p += backward_block) {
      double grad_u = 0.0;
      for (int warp = 0; warp < backward_warps; ++warp) grad_u += columns(warp)[p];
      const double v = to_float(in.v[at + p]), g = to_float(out.grad_y[at + p]);
      out.grad_v[at + p] = from_float<T>(static_cast<float>(scale * grad_u + in.skip_at(h, p) * g));
      columns(backward_warps)[p] += g * v;
      grad_scale += v * grad_u;
    }
    grad_scale = sum_block(grad_scale, scratch);
    if (threadIdx.x == 0 && out.grad_value_scale != nullptr) {
      out.grad_value_scale[in.step_at(b, t, h)] = static_cast<float>(grad_scale);
    }
  }

  /// What is complete after all steps.
  __device__ void finish(double decay_sum) const {
    if (out.decay_sums != nullptr && threadIdx.x == 0) out.decay_sums[head] = static_cast<float>(decay_sum);
    double skip_sum = 0.0;
    for (int64_t p = threadIdx.x; p < in.d_value; p += backward_block) {
      const double sum = columns(backward_warps)[p];
      skip_sum += sum;
      if (out.skip_sums != nullptr && in.skip_per_channel)
        out.skip_sums[head * in.d_value + p] = static_cast<float>(sum);
    }
    skip_sum = sum_block(skip_sum, scratch);
    if (out.skip_sums != nullptr && !in.skip_per_channel && threadIdx.x == 0)
      out.skip_sums[head] = static_cast<float>(skip_sum);
    if (out.grad_initial_state == nullptr) return;
    for (int64_t n = warp_index(); n < in.d_key; n += backward_warps) {
      for (int64_t p = lane_index(); p < in.d_value; p += warp_size) {
        out.grad_initial_state[state_at(n) + p] = static_cast<float>(work.grad_state[state_at(n) + p]);
      }
    }
  }
};

/// A block a head of a sequence. Shared: a double for each warp, twice. The log decay's gradient is found as on the CPU,
/// from sums of q grad_q - k grad_k: in double, since they cancel.
template <class T>
__global__ void backward(Inputs<T> in, Outputs<T> out, Work work) {
  SharedMemory shared;
  const SharedArray<double> scratch = shared.array<double>(backward_warps);
  const SharedArray<double> balances = shared.array<double>(backward_warps);
  const int64_t head = blockIdx.x, b = head / in.n_heads, h = head % in.n_heads;
  const HeadSweeps<T> sweeps{in, out, work, b, h, head, scratch, balances};
  for (int64_t t = 0; t < in.length; ++t) sweeps.forwards(t);
  double segment = sum_block(sweeps.start_backwards(), scratch), decay_sum = 0.0;
  for (int64_t t = in.length - 1; t >= 0; --t) {
    sweeps.backwards(t);
    sync_block();
    for (int warp = 0; warp < backward_warps; ++warp) segment += balances[warp];
    if (in.is_reset(b, t)) segment = 0.0;
    decay_sum += segment;
    if (threadIdx.x == 0 && out.grad_log_decay != nullptr) {
      out.grad_log_decay[in.step_at(b, t, h)] = static_cast<float>(segment);
    }
    sweeps.write_values(t);
  }
  sweeps.finish(decay_sum);
}

/// target (batch, length, n_groups, d_key) = the sum over each group's heads, in order; a thread an element.
template <class T>
__global__ void sum_heads(const float* of_heads, int64_t size, int64_t d_key, int64_t heads_per_group,
                          T* target) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= size) return;
  const float* from = of_heads + element / d_key * heads_per_group * d_key + element % d_key;
  float sum = 0.0f;
  for (int64_t i = 0; i < heads_per_group; ++i) sum += from[i * d_key];
  target[element] = from_float<T>(sum);
}

template <class T>
void launch_sum_heads(const Tensor& of_heads, int64_t heads_per_group, const Tensor& target) {
  launch("recurrent_matrix_state_sum_heads", sum_heads<T>,
         {.grid = {blocks_for(target.numel(), backward_block)}, .block = backward_block},
         of_heads.data<float>(), target.numel(), target.dim(3), heads_per_group, target.data<T>());
}

template <class T>
void backward_on_gpu(const MatrixStateBackwardArgs& args) {
  const Inputs<T> in(args.forward);
  const int64_t batch = args.forward.q.dim(0);
  const auto make = [&](const Shape& shape, DType dtype) {
    return Tensor::empty(shape, dtype, args.grad_y.device());
  };
  const Tensor state = make({batch, in.n_heads, in.d_key, in.d_value}, DType::f64),
               grad_state = empty_like(state);
  const Tensor balance = make({batch, in.n_heads, in.length, backward_warps}, DType::f64);
  const Tensor columns = make({batch, in.n_heads, backward_warps + 1, in.d_value}, DType::f64);
  const Tensor grad_q = make({batch, in.length, in.n_heads, in.d_key}, DType::f32),
               grad_k = empty_like(grad_q);
  const bool constant_decay = args.grad_log_decay.defined() && in.constant_decay;
  const Tensor decay_sums = constant_decay ? make({batch, in.n_heads}, DType::f32) : Tensor();
  const Tensor skip_sums =
      args.grad_skip.defined() ? make({batch, args.grad_skip.numel()}, DType::f32) : Tensor();
  launch(
      "recurrent_matrix_state_backward", backward<T>,
      {.grid = {batch * in.n_heads},
       .block = backward_block,
       .shared_bytes = 2 * shared_bytes<double>(backward_warps)},
      in,
      Outputs<T>{args.grad_y.data<T>(), args.grad_final_state.data<float>(), args.grad_v.data<T>(),
                 args.grad_value_scale.data<float>(),
                 constant_decay ? nullptr : args.grad_log_decay.data<float>(), decay_sums.data<float>(),
                 skip_sums.data<float>(), args.grad_initial_state.data<float>(), grad_q.data<float>(),
                 grad_k.data<float>()},
      Work{state.data<double>(), grad_state.data<double>(), balance.data<double>(), columns.data<double>()});
  launch_sum_heads<T>(grad_q, in.n_heads / in.n_groups, args.grad_q);
  launch_sum_heads<T>(grad_k, in.n_heads / in.n_groups, args.grad_k);
  if (constant_decay) sum_partials_cuda(decay_sums, args.grad_log_decay, false);
  if (args.grad_skip.defined()) sum_partials_cuda(skip_sums, args.grad_skip, false);
}

}  // namespace

void recurrent_matrix_state_forward_cuda(const MatrixStateForwardArgs& args) {
  dispatch_cuda(args.q.dtype(), "chunked_matrix_state", [&](auto element) {
    using T = decltype(element);
    const Inputs<T> in(args);
    const int64_t n_slices = blocks_for(in.d_value, forward_columns);
    const bool packed =
        can_pack(in.d_value, {in.v, in.initial_state, args.y.raw_data(), args.final_state.raw_data()});
    dispatch_packing(packed, [&](auto packing) {
      constexpr int N = packing;
      launch("recurrent_matrix_state_forward", forward<T, N>,
             {.grid = {args.q.dim(0) * in.n_heads * n_slices},
              .block = forward_block,
              .shared_bytes = shared_bytes<float>(forward_block * N)},
             in, args.y.data<T>(), args.final_state.data<float>(), n_slices);
    });
  });
}

void recurrent_matrix_state_backward_cuda(const MatrixStateBackwardArgs& args) {
  dispatch_cuda(args.grad_y.dtype(), "chunked_matrix_state",
                [&](auto element) { backward_on_gpu<decltype(element)>(args); });
}

}  // namespace headwater
