// The definition, step by step: the form that decodes, and the oracle of the chunked one.

#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "ops/chunked_matrix_state/matrix_state_head.h"

namespace headwater {
namespace {

template <class T>
void forward_head(const MatrixStateHead<T>& head) {
  T* state = head.final_state;
  const int64_t d_value = head.d_value;
  if (head.initial_state == nullptr) std::fill(state, state + head.d_key * d_value, T{0});
  std::vector<T> u(d_value);
  for (int64_t t = 0; t < head.length; ++t) {
    const T* v = head.v + t * head.value_step;
    T* y = head.y + t * head.value_step;
    const T decay = head.is_reset(t) ? T{0} : std::exp(head.log_decay_at(t));
    for (int64_t p = 0; p < d_value; ++p) {
      u[p] = head.scale_at(t) * v[p];
      y[p] = head.skip != nullptr ? head.skip_at(p) * v[p] : T{0};
    }
    const T* previous = t == 0 && head.initial_state != nullptr ? head.initial_state : state;
    for (int64_t n = 0; n < head.d_key; ++n) {
      const T q = head.q[t * head.key_step + n], k = head.k[t * head.key_step + n];
      const T* from = previous + n * d_value;
      T* to = state + n * d_value;
      for (int64_t p = 0; p < d_value; ++p) {
        to[p] = decay * from[p] + k * u[p];
        y[p] += q * to[p];
      }
    }
  }
}

/// The backward of one head in double precision, storing no state: one sweep forwards gives grad_q, one
/// backwards the rest. The gradient of the log decay needs a[t] <dS[t], S[t-1]>, and neither sweep has both;
/// but
///   sum over n of (q grad_q - k grad_k)[i], summed over i >= t up to the segment's end, + <S, dS> at the
///   sequence's end
/// is the same number (each pair's product counts once on the way in and once on the way out).
template <class T>
class BackwardHead {
 public:
  BackwardHead(const MatrixStateBackwardArgs& args, int64_t b, int64_t h)
      : args_(args),
        head_(args.forward, b, h),
        b_(b),
        h_(h),
        n_heads_(args.forward.v.dim(2)),
        state_(head_.d_key * head_.d_value),
        grad_state_(state_.size()),
        balance_(head_.length) {}

  void run() {
    sweep_forwards();
    sweep_backwards();
  }

 private:
  const T* grad_y(int64_t t) const {
    return args_.grad_y.data<T>() + (b_ * head_.length * n_heads_ + h_) * head_.d_value +
           t * head_.value_step;
  }
  int64_t key_offset(int64_t t) const { return head_.q - args_.forward.q.data<T>() + t * head_.key_step; }
  int64_t value_offset(int64_t t) const { return head_.v - args_.forward.v.data<T>() + t * head_.value_step; }
  int64_t step_offset(int64_t t) const { return (b_ * head_.length + t) * n_heads_ + h_; }
  int64_t state_offset() const { return (b_ * n_heads_ + h_) * head_.d_key * head_.d_value; }

  void sweep_forwards() {
    for (size_t i = 0; i < state_.size(); ++i) state_[i] = head_.initial_state ? head_.initial_state[i] : 0.0;
    for (int64_t t = 0; t < head_.length; ++t) {
      const double decay = head_.is_reset(t) ? 0.0 : std::exp(static_cast<double>(head_.log_decay_at(t)));
      for (int64_t n = 0; n < head_.d_key; ++n) {
        double grad_q = 0.0;
        const double k = head_.k[t * head_.key_step + n];
        for (int64_t p = 0; p < head_.d_value; ++p) {
          double& state = state_[n * head_.d_value + p];
          state = decay * state + k * head_.scale_at(t) * head_.v[t * head_.value_step + p];
          grad_q += state * grad_y(t)[p];
        }
        args_.grad_q.data<T>()[key_offset(t) + n] += static_cast<T>(grad_q);
        balance_[t] += head_.q[t * head_.key_step + n] * grad_q;
      }
    }
  }

  void sweep_backwards() {
    const T* grad_final =
        args_.grad_final_state.defined() ? args_.grad_final_state.data<T>() + state_offset() : nullptr;
    double segment = 0.0;
    for (size_t i = 0; i < grad_state_.size(); ++i) {
      grad_state_[i] = grad_final ? grad_final[i] : 0.0;
      segment += state_[i] * grad_state_[i];
    }
    for (int64_t t = head_.length - 1; t >= 0; --t) {
      step_backwards(t);
      segment += balance_[t];
      const double decay = head_.is_reset(t) ? 0.0 : std::exp(static_cast<double>(head_.log_decay_at(t)));
      deliver_log_decay(t, head_.is_reset(t) ? 0.0 : segment);
      if (head_.is_reset(t)) segment = 0.0;
      for (double& grad : grad_state_) grad *= decay;
    }
    if (args_.grad_initial_state.defined()) {
      T* target = args_.grad_initial_state.data<T>() + state_offset();
      for (size_t i = 0; i < grad_state_.size(); ++i) target[i] = static_cast<T>(grad_state_[i]);
    }
  }

  void step_backwards(int64_t t) {
    std::vector<double> grad_u(head_.d_value);
    const double scale = head_.scale_at(t);
    const T* v = head_.v + t * head_.value_step;
    for (int64_t n = 0; n < head_.d_key; ++n) {
      const double q = head_.q[t * head_.key_step + n], k = head_.k[t * head_.key_step + n];
      double grad_k = 0.0;
      for (int64_t p = 0; p < head_.d_value; ++p) {
        double& grad = grad_state_[n * head_.d_value + p];
        grad += q * grad_y(t)[p];
        grad_k += grad * scale * v[p];
        grad_u[p] += grad * k;
      }
      args_.grad_k.data<T>()[key_offset(t) + n] += static_cast<T>(grad_k);
      balance_[t] -= k * grad_k;
    }
    double grad_scale = 0.0;
    for (int64_t p = 0; p < head_.d_value; ++p) {
      const double g = grad_y(t)[p];
      args_.grad_v.data<T>()[value_offset(t) + p] = static_cast<T>(scale * grad_u[p] + head_.skip_at(p) * g);
      grad_scale += v[p] * grad_u[p];
      if (args_.grad_skip.defined()) {
        // Heads of one sequence are apart; sequences are walked one after another.
        T* target = args_.grad_skip.data<T>() + (head_.skip - args_.forward.skip.data<T>());
        target[p * head_.skip_step] += static_cast<T>(g * v[p]);
      }
    }
    if (args_.grad_value_scale.defined()) {
      args_.grad_value_scale.data<T>()[step_offset(t)] = static_cast<T>(grad_scale);
    }
  }

  void deliver_log_decay(int64_t t, double grad) {
    if (!args_.grad_log_decay.defined()) return;
    if (head_.decay_step == 0) {
      args_.grad_log_decay.data<T>()[h_] += static_cast<T>(grad);
    } else {
      args_.grad_log_decay.data<T>()[step_offset(t)] = static_cast<T>(grad);
    }
  }

  const MatrixStateBackwardArgs& args_;
  const MatrixStateHead<T> head_;
  int64_t b_, h_, n_heads_;
  std::vector<double> state_, grad_state_;
  std::vector<double> balance_;  // (length): sum over n of q grad_q - k grad_k
};

template <class T>
void backward(const MatrixStateBackwardArgs& args) {
  const int64_t batch = args.forward.q.dim(0), n_groups = args.forward.q.dim(2),
                n_heads = args.forward.v.dim(2);
  for (const Tensor& summed : {args.grad_q, args.grad_k, args.grad_log_decay, args.grad_skip}) {
    if (summed.defined()) summed.zero();
  }
  // Heads of a group add to the same grad_q and grad_k, so a group is one piece of work.
  const int64_t heads_per_group = n_heads / n_groups;
  parallel_for_each(n_groups, [&](int64_t group) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = group * heads_per_group; h < (group + 1) * heads_per_group; ++h) {
        BackwardHead<T>(args, b, h).run();
      }
    }
  });
}

}  // namespace

void recurrent_matrix_state_forward_cpu(const MatrixStateForwardArgs& args) {
  const int64_t batch = args.q.dim(0), n_heads = args.v.dim(2);
  dispatch_real(args.q.dtype(), "chunked_matrix_state", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t work_per_task =
        1 << 16;  // multiply-adds; a smaller piece is not worth waking a thread for
    const int64_t work_per_head = std::max<int64_t>(1, args.q.dim(1) * args.q.dim(3) * args.v.dim(3));
    parallel_for(batch * n_heads, 1 + work_per_task / work_per_head, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) forward_head(MatrixStateHead<T>(args, i / n_heads, i % n_heads));
    });
  });
}

void recurrent_matrix_state_backward_cpu(const MatrixStateBackwardArgs& args) {
  dispatch_real(args.forward.q.dtype(), "chunked_matrix_state",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
