#include <algorithm>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/partial_sums.h"
#include "ops/wkv/wkv.h"
#include "ops/wkv/wkv_kernels.h"

// A thread owns one channel of one piece of a sequence, which it walks step by step; neighbouring threads own neighbouring
// channels. With enough sequences and channels to fill a GPU a piece is the whole sequence. Otherwise a sequence is cut
// into pieces of whole stretches, and each direction takes three kernels: what every piece does to a state is summed up
// in a few numbers, all pieces at once; a thread a channel hands the state from piece to piece; then all pieces are
// walked at once. Letters as in wkv.cpp.

namespace headwater {
namespace {

constexpr int block = 64;
/// Steps whose inputs are asked for before the first of them is used.
constexpr int steps_ahead = 4;
constexpr float no_weight = static_cast<float>(wkv_no_weight);

struct Sizes {
  int64_t batch, length, channels, n_stretches, stretches_per_piece, n_pieces;
  __device__ int64_t piece_length() const { return stretches_per_piece * wkv_stretch; }
};

/// The cut depends on the shape alone, so that the bits do not depend on the GPU.
template <class Args>
Sizes sizes_of(const Args& args) {
  constexpr int64_t threads_wanted = 1 << 16;
  const int64_t batch = args.k.dim(0), length = args.k.dim(1), channels = args.k.dim(2);
  const int64_t n_stretches = args.borders.dim(1);
  const int64_t pieces_wanted = std::max<int64_t>(1, threads_wanted / std::max<int64_t>(1, batch * channels));
  const int64_t per_piece = blocks_for(n_stretches, std::min(n_stretches, pieces_wanted));
  return {batch, length, channels, n_stretches, per_piece, blocks_for(n_stretches, per_piece)};
}

template <class T>
struct Inputs {
  const T* k;
  const T* v;
  const float* time_decay;
  const float* time_first;
  const int32_t* resets;  // or null
};

template <class T, class Args>
Inputs<T> inputs_of(const Args& args) {
  return {args.k.template data<T>(), args.v.template data<T>(), args.time_decay.template data<float>(),
          args.time_first.template data<float>(), args.resets.template data<int32_t>()};
}

/// How much the present step has of a weight, and how much the past: s(z) and s(-z), each without cancellation, z being
/// the difference of their logarithms.
struct Shares {
  float ratio;  // of the smaller weight to the larger
  float present, past;
};

__device__ __forceinline__ Shares shares_of(float z) {
  const float ratio = expf(-fabsf(z));
  const float larger = 1.0f / (1.0f + ratio);
  const float smaller = ratio * larger;
  return {ratio, z < 0.0f ? smaller : larger, z < 0.0f ? larger : smaller};
}

struct State {
  float a, l;

  __device__ __forceinline__ void forget() {
    a = 0.0f;
    l = no_weight;
  }
  /// Adds (average, logarithm of weight) to the past, whose weight is decayed first by this much.
  __device__ __forceinline__ void merge(float average, float log_weight, float decay) {
    const float decayed = l - decay;
    const Shares q = shares_of(log_weight - decayed);
    a = q.past * a + q.present * average;
    l = fmaxf(log_weight, decayed) + log1pf(q.ratio);
  }
};

/// Number `index` of the states in (..., 2, channels), at one channel.
__device__ __forceinline__ State load_state(const float* states, int64_t index, int64_t channels, int64_t c) {
  const float* from = states + index * 2 * channels + c;
  return {from[0], from[channels]};
}
__device__ __forceinline__ void store_state(float* states, int64_t index, int64_t channels, int64_t c,
                                            const State& state) {
  float* to = states + index * 2 * channels + c;
  to[0] = state.a;
  to[channels] = state.l;
}
/// Of an absent tensor: what `otherwise` is.
__device__ __forceinline__ State load_state_or(const float* states, int64_t index, int64_t channels,
                                               int64_t c, const State& otherwise) {
  return states != nullptr ? load_state(states, index, channels, c) : otherwise;
}

/// What a thread owns: channel c in the steps [begin, end) of sequence b.
struct Place {
  int64_t b, piece, c, begin, end;
  __device__ int64_t index(const Sizes& sizes) const { return b * sizes.n_pieces + piece; }
};

__device__ __forceinline__ int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ Place place_of(const Sizes& sizes, int64_t thread) {
  const int64_t index = thread / sizes.channels, piece = index % sizes.n_pieces;
  const int64_t begin = piece * sizes.piece_length(), end = begin + sizes.piece_length();
  return {index / sizes.n_pieces, piece, thread % sizes.channels, begin,
          end < sizes.length ? end : sizes.length};
}

/// One channel of one sequence.
template <class T>
struct Channel {
  __device__ __forceinline__ Channel(const Inputs<T>& in, const Sizes& sizes, int64_t b, int64_t c)
      : stride(sizes.channels),
        offset(b * sizes.length * sizes.channels + c),
        k(in.k + offset),
        v(in.v + offset),
        resets(in.resets != nullptr ? in.resets + b * sizes.length : nullptr),
        w(expf(in.time_decay[c])),
        u(in.time_first[c]) {}

  struct Step {
    float k, v, grad_y;
    bool starts_document;
  };
  /// grad_y: null for 0.
  __device__ __forceinline__ Step load(int64_t t, const T* grad_y) const {
    return {to_float(k[t * stride]), to_float(v[t * stride]),
            grad_y != nullptr ? to_float(grad_y[offset + t * stride]) : 0.0f,
            resets != nullptr && resets[t] != 0};
  }

  __device__ __forceinline__ Shares shares_of_average(const State& state, float k_t) const {
    return shares_of(u + k_t - state.l);
  }
  __device__ __forceinline__ void advance(State& state, const Step& step) const {
    state.merge(step.v, step.k, w);
  }

  /// Calls body(t, step) for the steps [begin, end), in order.
  template <class Body>
  __device__ __forceinline__ void walk(int64_t begin, int64_t end, const T* grad_y, Body&& body) const {
    for (int64_t first = begin; first < end; first += steps_ahead) {
      Step steps[steps_ahead];
#pragma unroll
      for (int i = 0; i < steps_ahead; ++i) {
        if (first + i < end) steps[i] = load(first + i, grad_y);
      }
#pragma unroll
      for (int i = 0; i < steps_ahead; ++i) {
        if (first + i < end) body(first + i, steps[i]);
      }
    }
  }
  /// The same from the last to the first.
  template <class Body>
  __device__ __forceinline__ void walk_back(int64_t begin, int64_t end, const T* grad_y, Body&& body) const {
    for (int64_t last = end - 1; last >= begin; last -= steps_ahead) {
      Step steps[steps_ahead];
#pragma unroll
      for (int i = 0; i < steps_ahead; ++i) {
        if (last - i >= begin) steps[i] = load(last - i, grad_y);
      }
#pragma unroll
      for (int i = 0; i < steps_ahead; ++i) {
        if (last - i >= begin) body(last - i, steps[i]);
      }
    }
  }

  const int64_t stride, offset;
  const T* k;
  const T* v;
  const int32_t* resets;
  const float w, u;
};

// ---- forward

/// A thread a channel and piece. summaries (batch, n_pieces, 3, channels): the piece's own average and weight, and by how
/// much it decays what was before: by everything if a document starts in it.
template <class T>
__global__ void __launch_bounds__(block) summarise_pieces(Inputs<T> in, float* summaries, Sizes sizes) {
  const int64_t thread = thread_number();
  if (thread >= sizes.batch * sizes.n_pieces * sizes.channels) return;
  const Place place = place_of(sizes, thread);
  const Channel<T> channel(in, sizes, place.b, place.c);
  State state{0.0f, no_weight};
  float decay = channel.w * static_cast<float>(place.end - place.begin);
  channel.walk(place.begin, place.end, nullptr, [&](int64_t, const typename Channel<T>::Step& step) {
    if (step.starts_document) {
      state.forget();
      decay = -no_weight;
    }
    channel.advance(state, step);
  });
  float* to = summaries + place.index(sizes) * 3 * sizes.channels + place.c;
  to[0] = state.a;
  to[sizes.channels] = state.l;
  to[2 * sizes.channels] = decay;
}

/// A thread a channel and sequence: writes the borders where pieces begin, but for the first piece.
__global__ void __launch_bounds__(block)
    pass_states(const float* summaries, const float* initial_state, float* borders, Sizes sizes) {
  const int64_t thread = thread_number();
  if (thread >= sizes.batch * sizes.channels) return;
  const int64_t b = thread / sizes.channels, c = thread % sizes.channels;
  State state = load_state_or(initial_state, b, sizes.channels, c, {0.0f, no_weight});
  for (int64_t piece = 1; piece < sizes.n_pieces; ++piece) {
    const float* from = summaries + (b * sizes.n_pieces + piece - 1) * 3 * sizes.channels + c;
    state.merge(from[0], from[sizes.channels], from[2 * sizes.channels]);
    store_state(borders, b * sizes.n_stretches + piece * sizes.stretches_per_piece, sizes.channels, c, state);
  }
}

/// A thread a channel and piece. Reads the border where its piece begins, but for the first piece, and writes the others.
template <class T>
__global__ void __launch_bounds__(block) average_pieces(Inputs<T> in, const float* initial_state, T* y,
                                                        float* final_state, float* borders, Sizes sizes) {
  const int64_t thread = thread_number();
  if (thread >= sizes.batch * sizes.n_pieces * sizes.channels) return;
  const Place place = place_of(sizes, thread);
  const Channel<T> channel(in, sizes, place.b, place.c);
  const int64_t first_border = place.b * sizes.n_stretches;
  State state = place.piece == 0
                    ? load_state_or(initial_state, place.b, sizes.channels, place.c, {0.0f, no_weight})
                    : load_state(borders, first_border + place.begin / wkv_stretch, sizes.channels, place.c);
  channel.walk(place.begin, place.end, nullptr, [&](int64_t t, const typename Channel<T>::Step& step) {
    if (t % wkv_stretch == 0 && (t != place.begin || t == 0))
      store_state(borders, first_border + t / wkv_stretch, sizes.channels, place.c, state);
    if (step.starts_document) state.forget();
    const Shares p = channel.shares_of_average(state, step.k);
    y[channel.offset + t * channel.stride] = from_float<T>(p.past * state.a + p.present * step.v);
    channel.advance(state, step);
  });
  if (place.end == sizes.length) store_state(final_state, place.b, sizes.channels, place.c, state);
}

// ---- backward

// Through one step, ga and gl before it are linear in those after it:
//   ga = D ga' + ca,   gl = E ga' + D gl' + cl,   D = 1-q,  E = -q (1-q) (v - a),  ca = gy (1-p),  cl = -gp
// and so they are through any number of steps. The sums for a piece grow from its first step to its last, along with
// the states that they need: nothing is kept from step to step.

/// A thread a channel and piece. summaries (batch, n_pieces, 4, channels): D, E, ca, cl.
template <class T>
__global__ void __launch_bounds__(block)
    summarise_gradients(Inputs<T> in, const float* borders, const T* grad_y, float* summaries, Sizes sizes) {
  const int64_t thread = thread_number();
  if (thread >= sizes.batch * sizes.n_pieces * sizes.channels) return;
  const Place place = place_of(sizes, thread);
  const Channel<T> channel(in, sizes, place.b, place.c);
  State state =
      load_state(borders, place.b * sizes.n_stretches + place.begin / wkv_stretch, sizes.channels, place.c);
  float D = 1.0f, E = 0.0f, ca = 0.0f, cl = 0.0f;
  channel.walk(place.begin, place.end, grad_y, [&](int64_t, const typename Channel<T>::Step& step) {
    if (step.starts_document) state.forget();
    const Shares p = channel.shares_of_average(state, step.k);
    const Shares q = shares_of(step.k - (state.l - channel.w));
    const float difference = step.v - state.a;
    const float to_a = step.grad_y * p.past;
    cl += E * to_a - D * (step.grad_y * p.present * p.past * difference);
    ca += D * to_a;
    E = E * q.past - D * (q.present * q.past * difference);
    D *= q.past;
    channel.advance(state, step);
  });
  float* to = summaries + place.index(sizes) * 4 * sizes.channels + place.c;
  to[0] = D;
  to[sizes.channels] = E;
  to[2 * sizes.channels] = ca;
  to[3 * sizes.channels] = cl;
}

/// A thread a channel and sequence. after (batch, n_pieces, 2, channels): the gradient of the state after each piece.
__global__ void __launch_bounds__(block)
    pass_gradients(const float* summaries, const float* grad_final_state, float* after, Sizes sizes) {
  const int64_t thread = thread_number();
  if (thread >= sizes.batch * sizes.channels) return;
  const int64_t b = thread / sizes.channels, c = thread % sizes.channels;
  State gradient = load_state_or(grad_final_state, b, sizes.channels, c, {0.0f, 0.0f});
  for (int64_t piece = sizes.n_pieces - 1; piece >= 0; --piece) {
    const int64_t index = b * sizes.n_pieces + piece;
    store_state(after, index, sizes.channels, c, gradient);
    const float* from = summaries + index * 4 * sizes.channels + c;
    const float D = from[0], E = from[sizes.channels];
    gradient = {D * gradient.a + from[2 * sizes.channels],
                E * gradient.a + D * gradient.l + from[3 * sizes.channels]};
  }
}

template <class T>
struct Gradients {
  const T* y;          // or null
  const float* after;  // (batch, n_pieces, 2, channels) or null: 0
  T* k;
  T* v;
  float* initial_state;                    // or null
  float *decay_partials, *first_partials;  // (batch * n_pieces, channels)
};

/// A thread a channel and piece, whose stretches it walks from the last to the first: each forward, which puts the states
/// before its steps into shared memory, 2 x wkv_stretch numbers a thread, and then back. A thread reads only what it
/// wrote: there is no barrier.
template <class T>
__global__ void __launch_bounds__(block)
    gradients_of_pieces(Inputs<T> in, const float* borders, Gradients<T> gradients, Sizes sizes) {
  SharedMemory shared;
  const SharedArray<float> averages = shared.array<float>(block * static_cast<int>(wkv_stretch));
  const SharedArray<float> weights = shared.array<float>(block * static_cast<int>(wkv_stretch));
  const int64_t thread = thread_number();
  if (thread >= sizes.batch * sizes.n_pieces * sizes.channels) return;
  const Place place = place_of(sizes, thread);
  const Channel<T> channel(in, sizes, place.b, place.c);
  const int64_t index = place.index(sizes);
  const auto slot = [](int64_t step) {
    return static_cast<int>(step) * block + static_cast<int>(threadIdx.x);
  };

  State after = load_state_or(gradients.after, index, sizes.channels, place.c, {0.0f, 0.0f});
  float sum_u = 0.0f, sum_w = 0.0f;
  for (int64_t stretch = (place.end - 1) / wkv_stretch; stretch >= place.begin / wkv_stretch; --stretch) {
    const int64_t begin = stretch * wkv_stretch;
    const int64_t end = begin + wkv_stretch < place.end ? begin + wkv_stretch : place.end;
    State state = load_state(borders, place.b * sizes.n_stretches + stretch, sizes.channels, place.c);
    channel.walk(begin, end, nullptr, [&](int64_t t, const typename Channel<T>::Step& step) {
      if (step.starts_document) state.forget();
      averages[slot(t - begin)] = state.a;
      weights[slot(t - begin)] = state.l;
      channel.advance(state, step);
    });
    channel.walk_back(begin, end, gradients.y, [&](int64_t t, const typename Channel<T>::Step& step) {
      const State before{averages[slot(t - begin)], weights[slot(t - begin)]};
      const Shares p = channel.shares_of_average(before, step.k);
      const Shares q = shares_of(step.k - (before.l - channel.w));
      const float gp = step.grad_y * p.present * p.past * (step.v - before.a);
      const float gq = after.a * q.present * q.past * (step.v - before.a);
      const int64_t at = channel.offset + t * channel.stride;
      gradients.v[at] = from_float<T>(step.grad_y * p.present + after.a * q.present);
      gradients.k[at] = from_float<T>(gp + gq + after.l * q.present);
      sum_u += gp;
      sum_w += gq - after.l * q.past;
      after = {step.grad_y * p.past + after.a * q.past, after.l * q.past - gp - gq};
    });
  }
  if (place.piece == 0 && gradients.initial_state != nullptr)
    store_state(gradients.initial_state, place.b, sizes.channels, place.c, after);
  gradients.first_partials[index * sizes.channels + place.c] = sum_u;
  gradients.decay_partials[index * sizes.channels + place.c] = sum_w * channel.w;
}

LaunchShape threads_for(int64_t n, int64_t shared = 0) {
  return {.grid = {blocks_for(n, block)}, .block = block, .shared_bytes = shared};
}

template <class T>
void forward(const WkvForwardArgs& args) {
  const Sizes sizes = sizes_of(args);
  const int64_t n_threads = sizes.batch * sizes.n_pieces * sizes.channels;
  const Inputs<T> in = inputs_of<T>(args);
  const float* initial_state = args.initial_state.data<float>();
  float* borders = args.borders.data<float>();
  if (sizes.n_pieces > 1) {
    const Tensor summaries =
        Tensor::empty({sizes.batch, sizes.n_pieces, 3, sizes.channels}, DType::f32, args.k.device());
    launch("wkv_summarise_pieces", summarise_pieces<T>, threads_for(n_threads), in, summaries.data<float>(),
           sizes);
    launch("wkv_pass_states", pass_states, threads_for(sizes.batch * sizes.channels), summaries.data<float>(),
           initial_state, borders, sizes);
  }
  launch("wkv_average_pieces", average_pieces<T>, threads_for(n_threads), in, initial_state, args.y.data<T>(),
         args.final_state.data<float>(), borders, sizes);
}

template <class T>
void backward(const WkvBackwardArgs& args) {
  const Sizes sizes = sizes_of(args);
  const int64_t n_threads = sizes.batch * sizes.n_pieces * sizes.channels;
  const auto temporary = [&](const Shape& shape) {
    return Tensor::empty(shape, DType::f32, args.k.device());
  };
  const Inputs<T> in = inputs_of<T>(args);
  const float* borders = args.borders.data<float>();
  const T* grad_y = args.grad_y.data<T>();
  Tensor after = args.grad_final_state;
  if (sizes.n_pieces > 1) {
    after = temporary({sizes.batch, sizes.n_pieces, 2, sizes.channels});
    const Tensor summaries = temporary({sizes.batch, sizes.n_pieces, 4, sizes.channels});
    launch("wkv_summarise_gradients", summarise_gradients<T>, threads_for(n_threads), in, borders, grad_y,
           summaries.data<float>(), sizes);
    launch("wkv_pass_gradients", pass_gradients, threads_for(sizes.batch * sizes.channels),
           summaries.data<float>(), args.grad_final_state.data<float>(), after.data<float>(), sizes);
  }
  const Tensor decay_partials = temporary({sizes.batch * sizes.n_pieces, sizes.channels});
  const Tensor first_partials = empty_like(decay_partials);
  const Gradients<T> gradients{grad_y,
                               after.data<float>(),
                               args.grad_k.data<T>(),
                               args.grad_v.data<T>(),
                               args.grad_initial_state.data<float>(),
                               decay_partials.data<float>(),
                               first_partials.data<float>()};
  launch("wkv_gradients_of_pieces", gradients_of_pieces<T>,
         threads_for(n_threads, 2 * shared_bytes<float>(block * wkv_stretch)), in, borders, gradients, sizes);
  sum_partials_cuda(decay_partials, args.grad_time_decay, args.accumulate_decay);
  sum_partials_cuda(first_partials, args.grad_time_first, args.accumulate_first);
}

}  // namespace

void wkv_forward_cuda(const WkvForwardArgs& args) {
  dispatch_cuda(args.k.dtype(), "wkv", [&](auto element) { forward<decltype(element)>(args); });
}

void wkv_backward_cuda(const WkvBackwardArgs& args) {
  dispatch_cuda(args.k.dtype(), "wkv", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
