#include <vector>

#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/causal_conv1d/causal_conv1d_kernels.h"

// Lanes are channels: every loop over c runs along memory. Weights are transposed once to (d_conv, channels).
// A tap that meets nothing (before the sequence, across a reset) reads a row of zeros, so that no loop has a
// branch.

namespace headwater {
namespace {

/// One sequence as its taps see it.
template <class T>
struct Sequence {
  const T* x;              // (length, channels)
  const T* initial_state;  // (state_rows, channels) or nullptr
  const T* zeros;          // (channels)
  int64_t length, channels, state_rows;
  std::vector<int64_t> first_visible;  // per step: the earliest step in its document; below 0 without a reset

  /// The input at step `s`, seen from step `t` >= s.
  const T* row(int64_t s, int64_t t) const {
    if (s < first_visible[t]) return zeros;
    if (s >= 0) return x + s * channels;
    const int64_t state_row = state_rows + s;
    return initial_state != nullptr && state_row >= 0 ? initial_state + state_row * channels : zeros;
  }
};

template <class T, class Args>
Sequence<T> sequence_of(const Args& args, int64_t b, const std::vector<T>& zeros) {
  Sequence<T> sequence{};
  sequence.length = args.x.dim(1);
  sequence.channels = args.x.dim(2);
  sequence.x = args.x.template data<T>() + b * sequence.length * sequence.channels;
  sequence.zeros = zeros.data();
  if (args.initial_state.defined()) {
    sequence.state_rows = args.initial_state.dim(1);
    sequence.initial_state =
        args.initial_state.template data<T>() + b * sequence.state_rows * sequence.channels;
  }
  const int32_t* resets =
      args.resets.defined() ? args.resets.template data<int32_t>() + b * sequence.length : nullptr;
  int64_t first = -(int64_t{1} << 40);
  sequence.first_visible.resize(sequence.length);
  for (int64_t t = 0; t < sequence.length; ++t) {
    if (resets != nullptr && resets[t] != 0) first = t;
    sequence.first_visible[t] = first;
  }
  return sequence;
}

template <class T>
std::vector<T> transposed_weight(const Tensor& weight) {
  const int64_t channels = weight.dim(0);
  const int64_t d_conv = weight.dim(1);
  std::vector<T> result(channels * d_conv);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t w = 0; w < d_conv; ++w) result[w * channels + c] = weight.data<T>()[c * d_conv + w];
  }
  return result;
}

/// target = bias + sum_w weight[w] * rows[w], before the activation.
template <class T>
void filter_row(const T* weight, const T* bias, const T* const* rows, int64_t d_conv, int64_t channels,
                T* target) {
  if (d_conv == 4) {  // the usual width, in one pass
    const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const T *w0 = weight, *w1 = w0 + channels, *w2 = w1 + channels, *w3 = w2 + channels;
    for (int64_t c = 0; c < channels; ++c) {
      target[c] = bias[c] + w0[c] * r0[c] + w1[c] * r1[c] + w2[c] * r2[c] + w3[c] * r3[c];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) target[c] = bias[c];
  for (int64_t w = 0; w < d_conv; ++w) {
    const T* tap = weight + w * channels;
    const T* row = rows[w];
    for (int64_t c = 0; c < channels; ++c) target[c] += tap[c] * row[c];
  }
}

/// The inputs that the taps of step `t` meet, oldest first.
template <class T>
void gather_rows(const Sequence<T>& sequence, int64_t t, int64_t d_conv, const T** rows) {
  for (int64_t w = 0; w < d_conv; ++w) rows[w] = sequence.row(t - (d_conv - 1) + w, t);
}

/// Steps of all sequences cut into pieces of work; the cut depends on the shape alone.
struct Pieces {
  Pieces(int64_t batch_size, int64_t n_steps)
      : length(n_steps),
        per_sequence(std::clamp<int64_t>(64 / std::max<int64_t>(1, batch_size), 1,
                                         std::max<int64_t>(1, n_steps / 32))),
        count(batch_size * per_sequence) {}
  int64_t sequence(int64_t piece) const { return piece / per_sequence; }
  int64_t begin(int64_t piece) const { return length * (piece % per_sequence) / per_sequence; }
  int64_t end(int64_t piece) const { return length * (piece % per_sequence + 1) / per_sequence; }

  int64_t length, per_sequence, count;
};

template <class T>
void write_final_state(const CausalConv1dForwardArgs& args, int64_t b, const Sequence<T>& sequence) {
  const int64_t state_length = args.final_state.dim(1);
  T* target = args.final_state.data<T>() + b * state_length * sequence.channels;
  const int64_t last = sequence.length - 1;
  for (int64_t j = 0; j < state_length; ++j) {
    const T* row = sequence.row(sequence.length - state_length + j, last);
    std::copy(row, row + sequence.channels, target + j * sequence.channels);
  }
}

template <class T>
void forward(const CausalConv1dForwardArgs& args) {
  const int64_t batch = args.x.dim(0), length = args.x.dim(1), channels = args.x.dim(2);
  const int64_t d_conv = args.weight.dim(1);
  const std::vector<T> weight = transposed_weight<T>(args.weight);
  const std::vector<T> zeros(channels, T{0});
  const T* bias = args.bias.defined() ? args.bias.data<T>() : zeros.data();
  const Pieces pieces(batch, length);
  parallel_for_each(pieces.count, [&](int64_t piece) {
    const int64_t b = pieces.sequence(piece);
    const Sequence<T> sequence = sequence_of<T>(args, b, zeros);
    std::vector<const T*> rows(d_conv);
    for (int64_t t = pieces.begin(piece); t < pieces.end(piece); ++t) {
      T* y = args.y.data<T>() + (b * length + t) * channels;
      gather_rows(sequence, t, d_conv, rows.data());
      filter_row(weight.data(), bias, rows.data(), d_conv, channels, y);
      if (args.silu) {
        for (int64_t c = 0; c < channels; ++c) y[c] = silu(y[c]);
      }
    }
    if (pieces.end(piece) == length) write_final_state(args, b, sequence);
  });
}

/// What one piece of the backward adds up for the weights: (d_conv + 1, channels), the last row for the bias.
template <class T>
struct WeightSums {
  T* sums;
  int64_t d_conv, channels;

  void add(const T* g, const T* const* rows) const {
    for (int64_t w = 0; w < d_conv; ++w) {
      T* sum = sums + w * channels;
      const T* row = rows[w];
      for (int64_t c = 0; c < channels; ++c) sum[c] += g[c] * row[c];
    }
    T* sum = sums + d_conv * channels;
    for (int64_t c = 0; c < channels; ++c) sum[c] += g[c];
  }
};

/// The gradient of the input at step `s` (below 0: of the initial state), given g of the d_conv steps from s
/// on in a ring indexed by step modulo d_conv.
template <class T>
void gather_input_gradient(const CausalConv1dBackwardArgs& args, const Sequence<T>& sequence, const T* weight,
                           const T* ring, int64_t b, int64_t s, T* target) {
  const int64_t d_conv = args.weight.dim(1), channels = sequence.channels, length = sequence.length;
  std::fill(target, target + channels, T{0});
  for (int64_t t = std::max<int64_t>(s, 0); t < std::min(length, s + d_conv); ++t) {
    if (s < sequence.first_visible[t]) break;
    const T* tap = weight + (s + (d_conv - 1) - t) * channels;
    const T* g = ring + (t % d_conv) * channels;
    for (int64_t c = 0; c < channels; ++c) target[c] += tap[c] * g[c];
  }
  if (!args.grad_final_state.defined() || s < sequence.first_visible[length - 1]) return;
  const int64_t state_length = args.grad_final_state.dim(1);
  const int64_t state_row = s - (length - state_length);
  if (state_row < 0) return;
  const T* grad = args.grad_final_state.data<T>() + (b * state_length + state_row) * channels;
  for (int64_t c = 0; c < channels; ++c) target[c] += grad[c];
}

template <class T>
void backward_piece(const CausalConv1dBackwardArgs& args, const Pieces& pieces, int64_t piece,
                    const T* weight, const std::vector<T>& zeros, const WeightSums<T>& sums) {
  const int64_t b = pieces.sequence(piece), begin = pieces.begin(piece), end = pieces.end(piece);
  const int64_t length = args.x.dim(1), channels = args.x.dim(2), d_conv = args.weight.dim(1);
  const Sequence<T> sequence = sequence_of<T>(args, b, zeros);
  const T* bias = args.bias.defined() ? args.bias.data<T>() : zeros.data();
  std::vector<const T*> rows(d_conv);
  std::vector<T> ring(d_conv * channels);
  // Steps [begin, end) are this piece's; the d_conv - 1 after them are recomputed for their taps into it, and
  // the first piece also owns the steps of the initial state.
  const int64_t first_input = begin == 0 ? -sequence.state_rows : begin;
  const auto emit = [&](int64_t s) {
    T* target = s >= 0 ? args.grad_x.data<T>() + (b * length + s) * channels
                       : args.grad_initial_state.data<T>() +
                             (b * sequence.state_rows + sequence.state_rows + s) * channels;
    gather_input_gradient(args, sequence, weight, ring.data(), b, s, target);
  };
  const int64_t last = std::min(length, end + d_conv - 1);
  int64_t next_input = first_input;
  for (int64_t t = begin; t < last; ++t) {
    T* g = ring.data() + (t % d_conv) * channels;
    const T* grad_y = args.grad_y.data<T>() + (b * length + t) * channels;
    gather_rows(sequence, t, d_conv, rows.data());
    if (args.silu) {
      filter_row(weight, bias, rows.data(), d_conv, channels, g);
      for (int64_t c = 0; c < channels; ++c) g[c] = grad_y[c] * silu_derivative(g[c]);
    } else {
      std::copy(grad_y, grad_y + channels, g);
    }
    if (t < end) sums.add(g, rows.data());
    for (; next_input <= t - (d_conv - 1) && next_input < end; ++next_input) emit(next_input);
  }
  for (; next_input < end; ++next_input) emit(next_input);
}

template <class T>
void backward(const CausalConv1dBackwardArgs& args) {
  const int64_t channels = args.x.dim(2), d_conv = args.weight.dim(1);
  const std::vector<T> weight = transposed_weight<T>(args.weight);
  const std::vector<T> zeros(channels, T{0});
  const Pieces pieces(args.x.dim(0), args.x.dim(1));
  const int64_t width = (d_conv + 1) * channels;
  const Tensor partial = Tensor::zeros({pieces.count, width}, args.x.dtype());
  parallel_for_each(pieces.count, [&](int64_t piece) {
    const WeightSums<T> sums{partial.data<T>() + piece * width, d_conv, channels};
    backward_piece(args, pieces, piece, weight.data(), zeros, sums);
  });

  std::vector<T> total(width);
  sum_blocks(partial.data<T>(), pieces.count, width, false, total.data());
  const auto deliver = [](T& target, T value, bool accumulate) {
    target = accumulate ? target + value : value;
  };
  if (args.grad_weight.defined()) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t w = 0; w < d_conv; ++w) {
        deliver(args.grad_weight.data<T>()[c * d_conv + w], total[w * channels + c], args.accumulate_weight);
      }
    }
  }
  if (args.grad_bias.defined()) {
    for (int64_t c = 0; c < channels; ++c) {
      deliver(args.grad_bias.data<T>()[c], total[d_conv * channels + c], args.accumulate_bias);
    }
  }
}

}  // namespace

void causal_conv1d_forward_cpu(const CausalConv1dForwardArgs& args) {
  dispatch_real(args.x.dtype(), "causal_conv1d", [&](auto element) { forward<decltype(element)>(args); });
}

void causal_conv1d_backward_cpu(const CausalConv1dBackwardArgs& args) {
  dispatch_real(args.x.dtype(), "causal_conv1d", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
