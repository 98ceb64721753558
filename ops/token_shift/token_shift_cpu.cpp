#include <vector>

#include "core/parallel.h"
#include "ops/token_shift/token_shift_kernels.h"

// A row is one step of one sequence. A row that there is not (before the sequence, across a reset) is a row of zeros, so
// that loops over channels have no branch.

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 16;

/// What rows of either direction look up.
template <class T>
struct Rows {
  template <class Args>
  explicit Rows(const Args& args)
      : length(args.x.dim(1)),
        channels(args.x.dim(2)),
        count(args.x.dim(0) * length),
        x(args.x.template data<T>()),
        initial_state(args.initial_state.template data<T>()),
        resets(args.resets.template data<int32_t>()),
        zeros(channels, T{0}) {}

  bool starts_document(int64_t row) const { return resets != nullptr && resets[row] != 0; }
  bool is_first(int64_t row) const { return row % length == 0; }
  bool is_last(int64_t row) const { return row % length == length - 1; }

  /// x one step before `row`.
  const T* previous(int64_t row) const {
    if (starts_document(row)) return zeros.data();
    if (!is_first(row)) return x + (row - 1) * channels;
    return initial_state != nullptr ? initial_state + row / length * channels : zeros.data();
  }

  int64_t length, channels, count;
  const T* x;
  const T* initial_state;
  const int32_t* resets;
  std::vector<T> zeros;
};

template <class T>
void forward(const TokenShiftForwardArgs& args) {
  const Rows<T> rows(args);
  const int64_t channels = rows.channels;
  parallel_for(rows.count, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = rows.x + row * channels;
      const T* previous = rows.previous(row);
      for (int i = 0; i < args.n_mixes; ++i) {
        const T* mix = args.mixes[i].data<T>();
        T* y = args.y[i].data<T>() + row * channels;
        for (int64_t c = 0; c < channels; ++c) y[c] = mix[c] * x[c] + (T{1} - mix[c]) * previous[c];
      }
      if (rows.is_last(row))
        std::copy(x, x + channels, args.final_state.data<T>() + row / rows.length * channels);
    }
  });
}

/// target += what `row` gives to the step before it.
template <class T>
void add_to_previous(const TokenShiftBackwardArgs& args, int64_t row, int64_t channels, T* target) {
  for (int i = 0; i < args.n_mixes; ++i) {
    if (!args.grad_y[i].defined()) continue;
    const T* mix = args.mixes[i].data<T>();
    const T* g = args.grad_y[i].data<T>() + row * channels;
    for (int64_t c = 0; c < channels; ++c) target[c] += (T{1} - mix[c]) * g[c];
  }
}

/// Writes the gradients of one row; adds its part of those of the mixes to `mix_sums` (n_mixes, channels).
template <class T>
void backward_row(const TokenShiftBackwardArgs& args, const Rows<T>& rows, int64_t row, T* mix_sums) {
  const int64_t channels = rows.channels, b = row / rows.length;
  const T* x = rows.x + row * channels;
  const T* previous = rows.previous(row);
  T* grad_x = args.grad_x.data<T>() + row * channels;
  if (rows.is_last(row) && args.grad_final_state.defined()) {
    const T* kept = args.grad_final_state.data<T>() + b * channels;
    std::copy(kept, kept + channels, grad_x);
  } else {
    std::fill(grad_x, grad_x + channels, T{0});
  }
  for (int i = 0; i < args.n_mixes; ++i) {
    if (!args.grad_y[i].defined()) continue;
    const T* mix = args.mixes[i].data<T>();
    const T* g = args.grad_y[i].data<T>() + row * channels;
    T* sum = mix_sums + i * channels;
    for (int64_t c = 0; c < channels; ++c) {
      grad_x[c] += mix[c] * g[c];
      sum[c] += (x[c] - previous[c]) * g[c];
    }
  }
  if (!rows.is_last(row) && !rows.starts_document(row + 1)) add_to_previous(args, row + 1, channels, grad_x);
  if (rows.is_first(row) && args.grad_initial_state.defined()) {
    T* grad_initial = args.grad_initial_state.data<T>() + b * channels;
    std::fill(grad_initial, grad_initial + channels, T{0});
    if (!rows.starts_document(row)) add_to_previous(args, row, channels, grad_initial);
  }
}

template <class T>
void backward(const TokenShiftBackwardArgs& args) {
  const Rows<T> rows(args);
  const int64_t width = args.n_mixes * rows.channels;
  const RowBlocks blocks(rows.count);
  const Tensor partial = Tensor::zeros({blocks.n_blocks, width}, args.x.dtype());
  parallel_for_each(blocks.n_blocks, [&](int64_t block) {
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row)
      backward_row(args, rows, row, partial.data<T>() + block * width);
  });
  for (int i = 0; i < args.n_mixes; ++i) {
    if (!args.grad_mixes[i].defined()) continue;
    T* target = args.grad_mixes[i].data<T>();
    for (int64_t c = 0; c < rows.channels; ++c) {
      T sum = args.accumulate[i] ? target[c] : T{0};
      for (int64_t block = 0; block < blocks.n_blocks; ++block)
        sum += partial.data<T>()[block * width + i * rows.channels + c];
      target[c] = sum;
    }
  }
}

}  // namespace

void token_shift_forward_cpu(const TokenShiftForwardArgs& args) {
  dispatch_real(args.x.dtype(), "token_shift", [&](auto element) { forward<decltype(element)>(args); });
}

void token_shift_backward_cpu(const TokenShiftBackwardArgs& args) {
  dispatch_real(args.x.dtype(), "token_shift", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
