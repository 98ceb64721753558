#include <algorithm>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/causal_conv1d/causal_conv1d_kernels.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"

// Bound by memory, so everything is read once where it can be: a thread owns N channels side by side and a stretch of
// time, which it walks with the last d_conv - 1 inputs in registers. Neighbouring threads own neighbouring channels.
// Window widths of 2 to 4 have such kernels; the rest goes through plain ones, which read the inputs once for every tap.
//
// Letters: b sequence, c channel, t step, s the step of an input that step t sees, w tap.

namespace headwater {
namespace {

constexpr int block = 128;

// Steps whose inputs are asked for before the first of them is used: loads must be under way while others are computed
// with.
constexpr int forward_steps_ahead = 4;
constexpr int backward_steps_ahead = 2;

struct Sizes {
  int64_t length, channels, d_conv, state_rows, state_length;
  int64_t stretch, stretches_per_sequence, n_stretches;
  bool silu;
};

/// Steps are cut into stretches by the shape alone, and sums over time have a partial for each stretch: long enough that
/// neither the d_conv - 1 steps that a stretch shares with its neighbour nor the partials count, short enough that the
/// threads fill a GPU.
template <class Args>
Sizes sizes_of(const Args& args, int64_t state_length) {
  constexpr int64_t shortest = 16, threads_wanted = 1 << 17;
  const int64_t batch = args.x.dim(0), length = args.x.dim(1), channels = args.x.dim(2);
  const int64_t n_threads_per_step = blocks_for(channels, packed_size);
  const int64_t stretch = std::max(shortest, blocks_for(batch * length * n_threads_per_step, threads_wanted));
  const int64_t per_sequence = std::max<int64_t>(1, blocks_for(length, stretch));
  return {.length = length,
          .channels = channels,
          .d_conv = args.weight.dim(1),
          .state_rows = args.initial_state.defined() ? args.initial_state.dim(1) : 0,
          .state_length = state_length,
          .stretch = stretch,
          .stretches_per_sequence = per_sequence,
          .n_stretches = batch * per_sequence,
          .silu = args.silu};
}

/// Pointers may be null: bias, initial_state, resets.
template <class T>
struct Inputs {
  const T* x;
  const float* weight;
  const float* bias;
  const T* initial_state;
  const int32_t* resets;
};

template <class T, class Args>
Inputs<T> inputs_of(const Args& args) {
  return {args.x.template data<T>(), args.weight.template data<float>(), args.bias.template data<float>(),
          args.initial_state.template data<T>(), args.resets.template data<int32_t>()};
}

/// Steps [begin, end) of sequence b.
struct Stretch {
  int64_t index, b, begin, end;
};

__device__ Stretch stretch_at(const Sizes& sizes, int64_t index) {
  const int64_t begin = index % sizes.stretches_per_sequence * sizes.stretch;
  const int64_t end = begin + sizes.stretch < sizes.length ? begin + sizes.stretch : sizes.length;
  return {index, index / sizes.stretches_per_sequence, begin, end};
}

/// One sequence, seen from one channel on.
template <class T>
struct Sequence {
  const T* x;
  const T* initial_state;
  const int32_t* resets;
  int64_t length, channels, state_rows;

  __device__ bool starts_document(int64_t t) const { return resets != nullptr && t >= 0 && resets[t] != 0; }

  /// The inputs of step s at N channels; 0 where there are none.
  template <int N>
  __device__ void load(int64_t s, float (&values)[N]) const {
    if (s >= 0) {
      load_floats(x + s * channels, values);
    } else if (initial_state != nullptr && state_rows + s >= 0) {
      load_floats(initial_state + (state_rows + s) * channels, values);
    } else {
      for (int i = 0; i < N; ++i) values[i] = 0.0f;
    }
  }

  /// Whether a document starts in [first, last].
  __device__ bool is_cut(int64_t first, int64_t last) const {
    for (int64_t t = first; t <= last; ++t) {
      if (starts_document(t)) return true;
    }
    return false;
  }
};

template <class T>
__device__ Sequence<T> sequence_at(const Inputs<T>& in, const Sizes& sizes, int64_t b, int64_t c) {
  return {
      in.x + b * sizes.length * sizes.channels + c,
      in.initial_state != nullptr ? in.initial_state + b * sizes.state_rows * sizes.channels + c : nullptr,
      in.resets != nullptr ? in.resets + b * sizes.length : nullptr,
      sizes.length,
      sizes.channels,
      sizes.state_rows};
}

/// The last state_length inputs of sequence b; those before the last document's start are 0.
template <int N, class T>
__device__ void write_final_state(const Sequence<T>& sequence, const Sizes& sizes, int64_t b, int64_t c,
                                  T* final_state) {
  final_state += b * sizes.state_length * sizes.channels + c;
  bool visible = true;
  for (int64_t row = sizes.state_length - 1; row >= 0; --row) {
    const int64_t s = sizes.length - sizes.state_length + row;
    float values[N] = {};
    if (visible) sequence.load(s, values);
    store_floats(final_state + row * sizes.channels, values);
    visible = visible && !sequence.starts_document(s);
  }
}

/// What a thread keeps of its N channels: the taps, and the inputs that the taps of the present step meet.
template <int N, int d_conv>
struct Filter {
  float taps[N * d_conv];  // of channel i: from i * d_conv on
  float bias[N];
  float window[d_conv][N];

  /// At `begin`, before its step: the last d_conv - 1 inputs, as far as begin's document reaches.
  template <class T>
  __device__ void start(const Inputs<T>& in, const Sequence<T>& sequence, int64_t c, int64_t begin) {
    load_floats(in.weight + c * d_conv, taps);
    if (in.bias != nullptr) {
      load_floats(in.bias + c, bias);
    } else {
      for (int i = 0; i < N; ++i) bias[i] = 0.0f;
    }
    bool visible = true;
#pragma unroll
    for (int w = d_conv - 2; w >= 0; --w) {
      const int64_t s = begin - (d_conv - 1) + w;
      for (int i = 0; i < N; ++i) window[w][i] = 0.0f;
      if (visible) sequence.load(s, window[w]);
      visible = visible && !sequence.starts_document(s);
    }
  }

  __device__ void forget() {
#pragma unroll
    for (int w = 0; w < d_conv - 1; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) window[w][i] = 0.0f;
    }
  }

  /// Channel i before the activation, with the present input in window[d_conv - 1].
  __device__ float apply(int i) const {
    float sum = bias[i];
#pragma unroll
    for (int w = 0; w < d_conv; ++w) sum += taps[i * d_conv + w] * window[w][i];
    return sum;
  }

  __device__ void advance() {
#pragma unroll
    for (int w = 0; w < d_conv - 1; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) window[w][i] = window[w + 1][i];
    }
  }
};

/// One thread N channels of one stretch, channels first; the last stretch also writes the final state. Five blocks to a
/// multiprocessor are what its registers allow without spilling.
template <class T, int N, int d_conv>
__global__ void __launch_bounds__(block, 5)
    forward_in_registers(Inputs<T> in, T* y, T* final_state, Sizes sizes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads_per_step = sizes.channels / N;
  if (thread >= sizes.n_stretches * threads_per_step) return;
  const int64_t c = thread % threads_per_step * N;
  const Stretch stretch = stretch_at(sizes, thread / threads_per_step);
  const Sequence<T> sequence = sequence_at(in, sizes, stretch.b, c);
  y += stretch.b * sizes.length * sizes.channels + c;

  Filter<N, d_conv> filter;
  filter.start(in, sequence, c, stretch.begin);
  for (int64_t first = stretch.begin; first < stretch.end; first += forward_steps_ahead) {
    float ahead[forward_steps_ahead][N];
    bool starts[forward_steps_ahead];
#pragma unroll
    for (int k = 0; k < forward_steps_ahead; ++k) {
      if (first + k >= stretch.end) continue;
      load_floats(sequence.x + (first + k) * sizes.channels, ahead[k]);
      starts[k] = sequence.starts_document(first + k);
    }
#pragma unroll
    for (int k = 0; k < forward_steps_ahead; ++k) {
      if (first + k >= stretch.end) continue;
      if (starts[k]) filter.forget();
      float result[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        filter.window[d_conv - 1][i] = ahead[k][i];
        const float p = filter.apply(i);
        result[i] = sizes.silu ? silu_of(p) : p;
      }
      store_floats(y + (first + k) * sizes.channels, result);
      filter.advance();
    }
  }
  if (stretch.end == sizes.length) write_final_state<N>(sequence, sizes, stretch.b, c, final_state);
}

/// Where the gradients of the inputs of one sequence go, from one channel on.
template <class T>
struct InputGradients {
  T* grad_x;
  T* grad_initial_state;                     // or null
  const T* grad_final_state;                 // or null
  int64_t channels, state_rows, first_kept;  // first_kept: the step in row 0 of the final state

  /// Writes the gradient of step s, given what came through the taps; adds what came through the final state.
  template <int N>
  __device__ void write(const Sequence<T>& sequence, int64_t s, float (&values)[N]) const {
    if (grad_final_state != nullptr && s >= first_kept &&
        !sequence.is_cut(s + 1 > 0 ? s + 1 : 0, sequence.length - 1)) {
      float kept[N];
      load_floats(grad_final_state + (s - first_kept) * channels, kept);
      for (int i = 0; i < N; ++i) values[i] += kept[i];
    }
    T* target = s >= 0 ? grad_x + s * channels : grad_initial_state + (state_rows + s) * channels;
    store_floats(target, values);
  }
};

template <class T>
struct Gradients {
  const T* grad_y;
  const T* grad_final_state;
  T* grad_x;
  T* grad_initial_state;

  __device__ InputGradients<T> of_sequence(const Sizes& sizes, int64_t b, int64_t c) const {
    const int64_t state = b * sizes.state_rows * sizes.channels + c;
    const int64_t final_state = b * sizes.state_length * sizes.channels + c;
    return {grad_x + b * sizes.length * sizes.channels + c,
            grad_initial_state != nullptr ? grad_initial_state + state : nullptr,
            grad_final_state != nullptr ? grad_final_state + final_state : nullptr,
            sizes.channels,
            sizes.state_rows,
            sizes.length - sizes.state_length};
  }
};

/// Threads as in the forward. A thread owns the inputs of its stretch's steps (those of the first stretch also the
/// initial state's) and the stretch's part of the sums for the weights; for the inputs it walks d_conv - 1 steps beyond
/// the end. Partials: (stretches, channels, d_conv) and (stretches, channels).
template <class T, int N, int d_conv>
__global__ void __launch_bounds__(block)
    backward_in_registers(Inputs<T> in, Gradients<T> gradients, float* weight_partials, float* bias_partials,
                          Sizes sizes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads_per_step = sizes.channels / N;
  if (thread >= sizes.n_stretches * threads_per_step) return;
  const int64_t c = thread % threads_per_step * N;
  const Stretch stretch = stretch_at(sizes, thread / threads_per_step);
  const Sequence<T> sequence = sequence_at(in, sizes, stretch.b, c);
  const InputGradients<T> input_gradients = gradients.of_sequence(sizes, stretch.b, c);
  const T* grad_y = gradients.grad_y + stretch.b * sizes.length * sizes.channels + c;
  const bool owns_initial_state = stretch.begin == 0 && gradients.grad_initial_state != nullptr;
  const int64_t first_input = owns_initial_state ? -sizes.state_rows : stretch.begin;
  // Before the window's reach, inputs get gradients through the final state only.
  for (int64_t s = first_input; s < -(d_conv - 1); ++s) {
    float none[N] = {};
    input_gradients.write(sequence, s, none);
  }

  Filter<N, d_conv> filter;
  filter.start(in, sequence, c, stretch.begin);
  float pending[d_conv][N] = {};  // at step t, pending[j]: the gradient so far of the input of step t - j
  float weight_sums[N * d_conv] = {};
  float bias_sums[N] = {};
  int n_visible =
      d_conv - 1;  // how many earlier inputs the present step sees, as far as they are this thread's
  for (int64_t first = stretch.begin; first < stretch.end + d_conv - 1; first += backward_steps_ahead) {
    float x_ahead[backward_steps_ahead][N], g_ahead[backward_steps_ahead][N];
    bool starts[backward_steps_ahead];
#pragma unroll
    for (int k = 0; k < backward_steps_ahead; ++k) {
      const int64_t t = first + k;
      if (t >= sizes.length || t >= stretch.end + d_conv - 1) continue;
      load_floats(sequence.x + t * sizes.channels, x_ahead[k]);
      load_floats(grad_y + t * sizes.channels, g_ahead[k]);
      starts[k] = sequence.starts_document(t);
    }
#pragma unroll
    for (int k = 0; k < backward_steps_ahead; ++k) {
      const int64_t t = first + k;
      if (t >= stretch.end + d_conv - 1) continue;
#pragma unroll
      for (int j = d_conv - 1; j > 0; --j) {
        for (int i = 0; i < N; ++i) pending[j][i] = pending[j - 1][i];
      }
      for (int i = 0; i < N; ++i) pending[0][i] = 0.0f;
      if (t < sizes.length) {
        if (starts[k]) {
          filter.forget();
          n_visible = 0;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
          filter.window[d_conv - 1][i] = x_ahead[k][i];
          const float g = g_ahead[k][i] * (sizes.silu ? silu_slope(filter.apply(i)) : 1.0f);
#pragma unroll
          for (int j = 0; j < d_conv; ++j) {
            if (j <= n_visible) pending[j][i] += filter.taps[i * d_conv + d_conv - 1 - j] * g;
          }
          if (t < stretch.end) {
#pragma unroll
            for (int w = 0; w < d_conv; ++w) weight_sums[i * d_conv + w] += g * filter.window[w][i];
            bias_sums[i] += g;
          }
        }
        n_visible = n_visible + 1 < d_conv - 1 ? n_visible + 1 : d_conv - 1;
        filter.advance();
      }
      const int64_t s = t - (d_conv - 1);
      if (s >= first_input) input_gradients.write(sequence, s, pending[d_conv - 1]);
    }
  }
  store_floats(weight_partials + (stretch.index * sizes.channels + c) * d_conv, weight_sums);
  store_floats(bias_partials + stretch.index * sizes.channels + c, bias_sums);
}

// ---- any d_conv, plainly

/// The first step of the document that step t is in, or, if that is farther back than `reach` steps, t - reach.
template <class T>
__device__ int64_t first_visible(const Sequence<T>& sequence, int64_t t, int64_t reach) {
  int64_t s = t;
  while (s > t - reach && !sequence.starts_document(s)) --s;
  return s;
}

/// Channel c before the activation at step t, whose taps see the steps from `visible` on.
template <class T>
__device__ float filtered(const Inputs<T>& in, const Sequence<T>& sequence, const Sizes& sizes, int64_t c,
                          int64_t t, int64_t visible) {
  float sum = in.bias != nullptr ? in.bias[c] : 0.0f;
  for (int64_t s = visible; s <= t; ++s) {
    float x[1];
    sequence.load(s, x);
    sum += in.weight[c * sizes.d_conv + sizes.d_conv - 1 - (t - s)] * x[0];
  }
  return sum;
}

/// One thread one channel of one stretch; the last stretch also writes the final state.
template <class T>
__global__ void forward_plain(Inputs<T> in, T* y, T* final_state, Sizes sizes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= sizes.n_stretches * sizes.channels) return;
  const int64_t c = thread % sizes.channels;
  const Stretch stretch = stretch_at(sizes, thread / sizes.channels);
  const Sequence<T> sequence = sequence_at(in, sizes, stretch.b, c);
  for (int64_t t = stretch.begin; t < stretch.end; ++t) {
    const float p = filtered(in, sequence, sizes, c, t, first_visible(sequence, t, sizes.d_conv - 1));
    y[(stretch.b * sizes.length + t) * sizes.channels + c] = from_float<T>(sizes.silu ? silu_of(p) : p);
  }
  if (stretch.end == sizes.length) write_final_state<1>(sequence, sizes, stretch.b, c, final_state);
}

/// g: the gradient before the activation, f32 (batch, length, channels). One thread one channel of one stretch.
template <class T>
__global__ void gradient_before_activation(Inputs<T> in, const T* grad_y, float* g, Sizes sizes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= sizes.n_stretches * sizes.channels) return;
  const int64_t c = thread % sizes.channels;
  const Stretch stretch = stretch_at(sizes, thread / sizes.channels);
  const Sequence<T> sequence = sequence_at(in, sizes, stretch.b, c);
  for (int64_t t = stretch.begin; t < stretch.end; ++t) {
    const int64_t at = (stretch.b * sizes.length + t) * sizes.channels + c;
    const int64_t visible = first_visible(sequence, t, sizes.d_conv - 1);
    const float slope = sizes.silu ? silu_slope(filtered(in, sequence, sizes, c, t, visible)) : 1.0f;
    g[at] = to_float(grad_y[at]) * slope;
  }
}

/// One thread one input: channels first, then the steps of the initial state and of x, then sequences.
template <class T>
__global__ void input_gradients_plain(Inputs<T> in, const float* g, Gradients<T> gradients, Sizes sizes,
                                      int64_t batch) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n_steps = sizes.state_rows + sizes.length;
  if (thread >= batch * n_steps * sizes.channels) return;
  const int64_t c = thread % sizes.channels, b = thread / sizes.channels / n_steps;
  const int64_t s = thread / sizes.channels % n_steps - sizes.state_rows;
  const Sequence<T> sequence = sequence_at(in, sizes, b, c);
  const int64_t end = s + sizes.d_conv < sizes.length ? s + sizes.d_conv : sizes.length;
  float sum[1] = {0.0f};
  for (int64_t t = s > 0 ? s : 0; t < end; ++t) {
    if (t > s && sequence.starts_document(t)) break;
    sum[0] += in.weight[c * sizes.d_conv + sizes.d_conv - 1 - (t - s)] *
              g[(b * sizes.length + t) * sizes.channels + c];
  }
  gradients.of_sequence(sizes, b, c).write(sequence, s, sum);
}

/// One thread one tap of one stretch, taps of a channel first; the last tap's also sums for the bias. Partials as those
/// of backward_in_registers.
template <class T>
__global__ void sum_weights_plain(Inputs<T> in, const float* g, float* weight_partials, float* bias_partials,
                                  Sizes sizes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t width = sizes.channels * sizes.d_conv;
  if (thread >= sizes.n_stretches * width) return;
  const int64_t c = thread % width / sizes.d_conv;
  const int64_t delay = sizes.d_conv - 1 - thread % sizes.d_conv;
  const Stretch stretch = stretch_at(sizes, thread / width);
  const Sequence<T> sequence = sequence_at(in, sizes, stretch.b, c);
  int64_t visible = first_visible(sequence, stretch.begin, sizes.d_conv - 1);
  float weight_sum = 0.0f, bias_sum = 0.0f;
  for (int64_t t = stretch.begin; t < stretch.end; ++t) {
    if (sequence.starts_document(t)) visible = t;
    const float g_t = g[(stretch.b * sizes.length + t) * sizes.channels + c];
    float x[1] = {0.0f};
    if (t - delay >= visible) sequence.load(t - delay, x);
    weight_sum += g_t * x[0];
    bias_sum += g_t;
  }
  weight_partials[thread] = weight_sum;
  if (delay == 0) bias_partials[stretch.index * sizes.channels + c] = bias_sum;
}

LaunchShape one_thread_each(int64_t n_threads) {
  return {.grid = {blocks_for(n_threads, block)}, .block = block};
}

bool fits_registers(int64_t d_conv) {
  return d_conv >= 2 && d_conv <= 4;
}

/// Calls `body` with the window width as a std::integral_constant.
template <class Body>
void dispatch_width(int64_t d_conv, Body&& body) {
  if (d_conv == 2) body(std::integral_constant<int, 2>{});
  if (d_conv == 3) body(std::integral_constant<int, 3>{});
  if (d_conv == 4) body(std::integral_constant<int, 4>{});
}

template <class T>
void forward(const CausalConv1dForwardArgs& args) {
  const Sizes sizes = sizes_of(args, args.final_state.dim(1));
  const Inputs<T> in = inputs_of<T>(args);
  T* y = args.y.data<T>();
  T* final_state = args.final_state.data<T>();
  if (!fits_registers(sizes.d_conv)) {
    launch("causal_conv1d_forward_plain", forward_plain<T>,
           one_thread_each(sizes.n_stretches * sizes.channels), in, y, final_state, sizes);
    return;
  }
  const bool packed = can_pack(sizes.channels, {in.x, in.weight, in.bias, in.initial_state, y, final_state});
  dispatch_width(sizes.d_conv, [&](auto d_conv) {
    dispatch_packing(packed, [&](auto n) {
      launch("causal_conv1d_forward", forward_in_registers<T, n, d_conv>,
             one_thread_each(sizes.n_stretches * (sizes.channels / n)), in, y, final_state, sizes);
    });
  });
}

template <class T>
void backward_plain(const CausalConv1dBackwardArgs& args, const Inputs<T>& in, const Gradients<T>& gradients,
                    const Sizes& sizes, float* weight_partials, float* bias_partials) {
  const Tensor g_memory = Tensor::empty(args.x.shape(), DType::f32, args.x.device());
  float* g = g_memory.data<float>();
  const int64_t batch = args.x.dim(0);
  launch("causal_conv1d_gradient_before_activation", gradient_before_activation<T>,
         one_thread_each(sizes.n_stretches * sizes.channels), in, gradients.grad_y, g, sizes);
  launch("causal_conv1d_input_gradients", input_gradients_plain<T>,
         one_thread_each(batch * (sizes.state_rows + sizes.length) * sizes.channels), in, g, gradients, sizes,
         batch);
  launch("causal_conv1d_sum_weights", sum_weights_plain<T>,
         one_thread_each(sizes.n_stretches * sizes.channels * sizes.d_conv), in, g, weight_partials,
         bias_partials, sizes);
}

template <class T>
void backward(const CausalConv1dBackwardArgs& args) {
  const Sizes sizes = sizes_of(args, args.grad_final_state.defined() ? args.grad_final_state.dim(1) : 0);
  const Inputs<T> in = inputs_of<T>(args);
  const Gradients<T> gradients{args.grad_y.data<T>(), args.grad_final_state.data<T>(), args.grad_x.data<T>(),
                               args.grad_initial_state.data<T>()};
  const Tensor weight_partials =
      Tensor::empty({sizes.n_stretches, sizes.channels * sizes.d_conv}, DType::f32, args.x.device());
  const Tensor bias_partials =
      Tensor::empty({sizes.n_stretches, sizes.channels}, DType::f32, args.x.device());
  if (fits_registers(sizes.d_conv)) {
    const bool packed = can_pack(
        sizes.channels, {in.x, in.weight, in.bias, in.initial_state, gradients.grad_y,
                         gradients.grad_final_state, gradients.grad_x, gradients.grad_initial_state});
    dispatch_width(sizes.d_conv, [&](auto d_conv) {
      dispatch_packing(packed, [&](auto n) {
        launch("causal_conv1d_backward", backward_in_registers<T, n, d_conv>,
               one_thread_each(sizes.n_stretches * (sizes.channels / n)), in, gradients,
               weight_partials.data<float>(), bias_partials.data<float>(), sizes);
      });
    });
  } else {
    backward_plain(args, in, gradients, sizes, weight_partials.data<float>(), bias_partials.data<float>());
  }
  sum_partials_cuda(weight_partials, args.grad_weight, args.accumulate_weight);
  sum_partials_cuda(bias_partials, args.grad_bias, args.accumulate_bias);
}

}  // namespace

void causal_conv1d_forward_cuda(const CausalConv1dForwardArgs& args) {
  dispatch_cuda(args.x.dtype(), "causal_conv1d", [&](auto element) { forward<decltype(element)>(args); });
}

void causal_conv1d_backward_cuda(const CausalConv1dBackwardArgs& args) {
  dispatch_cuda(args.x.dtype(), "causal_conv1d", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
