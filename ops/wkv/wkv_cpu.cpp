#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/wkv/wkv.h"
#include "ops/wkv/wkv_kernels.h"

// Lanes are channels: a task is a block of neighbouring channels of one sequence, which it walks with their state in
// cache. Every loop over lanes runs along memory, without branches. Letters as in wkv.cpp.

namespace headwater {
namespace {

constexpr int64_t lanes_per_task = 64;

/// How much the present step has of a weight, and how much the past: s(z) and s(-z), each without cancellation, z being
/// the difference of their logarithms.
template <class T>
struct Shares {
  explicit Shares(T z) : ratio(exp_vectorisable(z < T{0} ? z : -z)) {
    const T larger = T{1} / (T{1} + ratio);
    const T smaller = ratio * larger;
    present = z < T{0} ? smaller : larger;
    past = z < T{0} ? larger : smaller;
  }
  T ratio;  // of the smaller weight to the larger
  T present, past;
};

/// One task's part of a tensor (batch, length, channels): its steps' rows are `channels` apart.
template <class T>
T* rows_at(const Tensor& tensor, int64_t b, int64_t first_lane) {
  return tensor.defined() ? tensor.data<T>() + b * tensor.dim(1) * tensor.dim(2) + first_lane : nullptr;
}

/// The lanes of one task. States, and gradients of states, are two rows of lanes.
template <class T>
struct Lanes {
  template <class Args>
  Lanes(const Args& args, int64_t task)
      : length(args.k.dim(1)),
        channels(args.k.dim(2)),
        b(task / tasks_per_sequence(channels)),
        first(task % tasks_per_sequence(channels) * lanes_per_task),
        count(std::min(lanes_per_task, channels - first)),
        k(rows_at<T>(args.k, b, first)),
        v(rows_at<T>(args.v, b, first)),
        u(args.time_first.template data<T>() + first),
        resets(args.resets.defined() ? args.resets.template data<int32_t>() + b * length : nullptr) {
    for (int64_t i = 0; i < count; ++i)
      w[i] = exp_vectorisable(args.time_decay.template data<T>()[first + i]);
  }

  static int64_t tasks_per_sequence(int64_t channels) {
    return (channels + lanes_per_task - 1) / lanes_per_task;
  }

  /// State number `index` of a tensor (..., 2, channels).
  void load_state(const Tensor& states, int64_t index, T* a, T* l) const {
    const T* from = states.data<T>() + index * 2 * channels + first;
    std::copy(from, from + count, a);
    std::copy(from + channels, from + channels + count, l);
  }
  void store_state(const Tensor& states, int64_t index, const T* a, const T* l) const {
    T* to = states.data<T>() + index * 2 * channels + first;
    std::copy(a, a + count, to);
    std::copy(l, l + count, to + channels);
  }

  void forget_at_reset(int64_t t, T* a, T* l) const {
    if (resets == nullptr || resets[t] == 0) return;
    std::fill(a, a + count, T{0});
    std::fill(l, l + count, static_cast<T>(wkv_no_weight));
  }

  /// The state after step t, in place. No other memory overlaps the state's.
  void advance(int64_t t, T* __restrict a, T* __restrict l) const {
    const T* k_row = k + t * channels;
    const T* v_row = v + t * channels;
    for (int64_t i = 0; i < count; ++i) {
      const T decayed = l[i] - w[i];
      const Shares<T> q(k_row[i] - decayed);
      a[i] = q.past * a[i] + q.present * v_row[i];
      l[i] = (k_row[i] > decayed ? k_row[i] : decayed) + log1p_vectorisable(q.ratio);
    }
  }

  void average(int64_t t, const T* __restrict a, const T* __restrict l, T* __restrict y) const {
    const T* k_row = k + t * channels;
    const T* v_row = v + t * channels;
    for (int64_t i = 0; i < count; ++i) {
      const Shares<T> p(u[i] + k_row[i] - l[i]);
      y[i] = p.past * a[i] + p.present * v_row[i];
    }
  }

  const int64_t length, channels, b, first, count;
  const T *k, *v;  // of step 0, from the first lane on
  const T* u;
  const int32_t* resets;
  T w[lanes_per_task];
};

template <class T>
void forward_lanes(const WkvForwardArgs& args, int64_t task) {
  const Lanes<T> lanes(args, task);
  const int64_t n_stretches = args.borders.dim(1);
  T a[lanes_per_task] = {}, l[lanes_per_task];
  std::fill(l, l + lanes_per_task, static_cast<T>(wkv_no_weight));
  if (args.initial_state.defined()) lanes.load_state(args.initial_state, lanes.b, a, l);
  T* y = rows_at<T>(args.y, lanes.b, lanes.first);
  for (int64_t t = 0; t < lanes.length; ++t) {
    if (t % wkv_stretch == 0) lanes.store_state(args.borders, lanes.b * n_stretches + t / wkv_stretch, a, l);
    lanes.forget_at_reset(t, a, l);
    lanes.average(t, a, l, y + t * lanes.channels);
    lanes.advance(t, a, l);
  }
  lanes.store_state(args.final_state, lanes.b, a, l);
}

/// What the backward of one task carries from step to step, and its sums.
template <class T>
struct LaneGradients {
  T a[lanes_per_task] = {}, l[lanes_per_task] = {};  // of the state after the present step
  T u[lanes_per_task] = {}, w[lanes_per_task] = {};  // sums so far

  /// One step back; a0 and l0 are the state before step t. grad_y null: 0.
  void step(const Lanes<T>& lanes, int64_t t, const T* __restrict a0, const T* __restrict l0,
            const T* __restrict grad_y, T* __restrict grad_k, T* __restrict grad_v) {
    const T* k = lanes.k + t * lanes.channels;
    const T* v = lanes.v + t * lanes.channels;
    for (int64_t i = 0; i < lanes.count; ++i) {
      const T gy = grad_y != nullptr ? grad_y[i] : T{0};
      const Shares<T> p(lanes.u[i] + k[i] - l0[i]), q(k[i] - (l0[i] - lanes.w[i]));
      const T gp = gy * p.present * p.past * (v[i] - a0[i]);
      const T gq = a[i] * q.present * q.past * (v[i] - a0[i]);
      grad_v[i] = gy * p.present + a[i] * q.present;
      grad_k[i] = gp + gq + l[i] * q.present;
      u[i] += gp;
      w[i] += gq - l[i] * q.past;
      a[i] = gy * p.past + a[i] * q.past;
      l[i] = l[i] * q.past - gp - gq;
    }
  }
};

/// The task writes its part of `sums` (batch, 2, channels): the gradients of u and of time_decay in each sequence.
template <class T>
void backward_lanes(const WkvBackwardArgs& args, int64_t task, const Tensor& sums) {
  const Lanes<T> lanes(args, task);
  const int64_t n_stretches = args.borders.dim(1), channels = lanes.channels;
  LaneGradients<T> gradients;
  if (args.grad_final_state.defined())
    lanes.load_state(args.grad_final_state, lanes.b, gradients.a, gradients.l);
  const T* grad_y = rows_at<T>(args.grad_y, lanes.b, lanes.first);
  T* grad_k = rows_at<T>(args.grad_k, lanes.b, lanes.first);
  T* grad_v = rows_at<T>(args.grad_v, lanes.b, lanes.first);

  // The states before each step of one stretch.
  std::vector<T> a(wkv_stretch * lanes_per_task), l(wkv_stretch * lanes_per_task);
  const auto a_at = [&](int64_t j) { return a.data() + j * lanes_per_task; };
  const auto l_at = [&](int64_t j) { return l.data() + j * lanes_per_task; };
  for (int64_t stretch = n_stretches - 1; stretch >= 0; --stretch) {
    const int64_t begin = stretch * wkv_stretch, n_steps = std::min(wkv_stretch, lanes.length - begin);
    lanes.load_state(args.borders, lanes.b * n_stretches + stretch, a_at(0), l_at(0));
    for (int64_t j = 0; j < n_steps; ++j) {
      lanes.forget_at_reset(begin + j, a_at(j), l_at(j));
      if (j + 1 == n_steps) break;
      std::copy(a_at(j), a_at(j) + lanes.count, a_at(j + 1));
      std::copy(l_at(j), l_at(j) + lanes.count, l_at(j + 1));
      lanes.advance(begin + j, a_at(j + 1), l_at(j + 1));
    }
    for (int64_t j = n_steps - 1; j >= 0; --j) {
      const int64_t row = (begin + j) * channels;
      gradients.step(lanes, begin + j, a_at(j), l_at(j), grad_y != nullptr ? grad_y + row : nullptr,
                     grad_k + row, grad_v + row);
    }
  }
  if (args.grad_initial_state.defined())
    lanes.store_state(args.grad_initial_state, lanes.b, gradients.a, gradients.l);
  for (int64_t i = 0; i < lanes.count; ++i) gradients.w[i] *= lanes.w[i];
  lanes.store_state(sums, lanes.b, gradients.u, gradients.w);
}

template <class T>
void forward(const WkvForwardArgs& args) {
  const int64_t n_tasks = args.k.dim(0) * Lanes<T>::tasks_per_sequence(args.k.dim(2));
  parallel_for_each(n_tasks, [&](int64_t task) { forward_lanes<T>(args, task); });
}

template <class T>
void add_over_batch(const Tensor& sums, int64_t which, const Tensor& target, bool accumulate) {
  if (!target.defined()) return;
  const int64_t batch = sums.dim(0), channels = sums.dim(2);
  for (int64_t c = 0; c < channels; ++c) {
    T sum = accumulate ? target.data<T>()[c] : T{0};
    for (int64_t b = 0; b < batch; ++b) sum += sums.data<T>()[(b * 2 + which) * channels + c];
    target.data<T>()[c] = sum;
  }
}

template <class T>
void backward(const WkvBackwardArgs& args) {
  const int64_t batch = args.k.dim(0), channels = args.k.dim(2);
  const Tensor sums = Tensor::empty({batch, 2, channels}, args.k.dtype());
  parallel_for_each(batch * Lanes<T>::tasks_per_sequence(channels),
                    [&](int64_t task) { backward_lanes<T>(args, task, sums); });
  add_over_batch<T>(sums, 0, args.grad_time_first, args.accumulate_first);
  add_over_batch<T>(sums, 1, args.grad_time_decay, args.accumulate_decay);
}

}  // namespace

void wkv_forward_cpu(const WkvForwardArgs& args) {
  dispatch_real(args.k.dtype(), "wkv", [&](auto element) { forward<decltype(element)>(args); });
}

void wkv_backward_cpu(const WkvBackwardArgs& args) {
  dispatch_real(args.k.dtype(), "wkv", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
