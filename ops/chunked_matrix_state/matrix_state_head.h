// Private to the operator's CPU kernels: one head of one sequence, as pointers and steps.
#pragma once

#include "ops/chunked_matrix_state/chunked_matrix_state_kernels.h"

namespace headwater {

/// Indices: b sequence, t step, h head, n key channel, p value channel.
template <class T>
struct MatrixStateHead {
  int64_t length, d_key, d_value;
  const T *q, *k;  // (length, d_key), rows key_step apart
  int64_t key_step;
  const T* v;  // (length, d_value), rows value_step apart
  int64_t value_step;
  const T* log_decay;  // nullptr: none; decay_step 0: constant
  int64_t decay_step;
  const T* value_scale;  // nullptr: 1
  int64_t scale_step;
  const T* skip;  // nullptr: none; skip_step 0: one number for all channels
  int64_t skip_step;
  const T* initial_state;  // (d_key, d_value) or nullptr
  const int32_t* resets;   // (length) or nullptr
  T* y;                    // like v; nullptr in the backward
  T* final_state;          // (d_key, d_value); nullptr in the backward

  MatrixStateHead(const MatrixStateForwardArgs& args, int64_t b, int64_t h)
      : length(args.q.dim(1)), d_key(args.q.dim(3)), d_value(args.v.dim(3)) {
    const int64_t n_groups = args.q.dim(2), n_heads = args.v.dim(2);
    const int64_t group = h / (n_heads / n_groups);
    const int64_t key_offset = (b * length * n_groups + group) * d_key;
    const int64_t value_offset = (b * length * n_heads + h) * d_value;
    const int64_t state_offset = (b * n_heads + h) * d_key * d_value;
    const int64_t step_offset = b * length * n_heads + h;
    q = args.q.data<T>() + key_offset;
    k = args.k.data<T>() + key_offset;
    key_step = n_groups * d_key;
    v = args.v.data<T>() + value_offset;
    value_step = n_heads * d_value;
    const bool constant = args.log_decay.defined() && args.log_decay.shape().n_axes() == 1;
    log_decay = args.log_decay.defined() ? args.log_decay.data<T>() + (constant ? h : step_offset) : nullptr;
    decay_step = constant ? 0 : n_heads;
    value_scale = args.value_scale.defined() ? args.value_scale.data<T>() + step_offset : nullptr;
    scale_step = n_heads;
    const bool per_channel = args.skip.defined() && args.skip.shape().n_axes() == 2;
    skip = args.skip.defined() ? args.skip.data<T>() + (per_channel ? h * d_value : h) : nullptr;
    skip_step = per_channel ? 1 : 0;
    initial_state = args.initial_state.defined() ? args.initial_state.data<T>() + state_offset : nullptr;
    resets = args.resets.defined() ? args.resets.data<int32_t>() + b * length : nullptr;
    y = args.y.defined() ? args.y.data<T>() + value_offset : nullptr;
    final_state = args.final_state.defined() ? args.final_state.data<T>() + state_offset : nullptr;
  }

  bool is_reset(int64_t t) const { return resets != nullptr && resets[t] != 0; }
  T log_decay_at(int64_t t) const { return log_decay != nullptr ? log_decay[t * decay_step] : T{0}; }
  T scale_at(int64_t t) const { return value_scale != nullptr ? value_scale[t * scale_step] : T{1}; }
  T skip_at(int64_t p) const { return skip != nullptr ? skip[p * skip_step] : T{0}; }
};

}  // namespace headwater
