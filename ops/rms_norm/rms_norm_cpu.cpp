#include <cmath>
#include <vector>

#include "core/matrix_block.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/check.h"
#include "ops/rms_norm/rms_norm_kernels.h"

// One row is in a core's first-level cache while it is worked on, so several short loops over it cost little
// more than one long one, and each of them vectorises.

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 16;

/// v = x, or x * silu(gate) when the gate comes first.
template <class T>
void gated_row(const T* x, const T* gate, bool norm_before_gate, int64_t d, T* v) {
  if (gate == nullptr || norm_before_gate) {
    for (int64_t j = 0; j < d; ++j) v[j] = x[j];
  } else {
    for (int64_t j = 0; j < d; ++j) v[j] = x[j] * silu(gate[j]);
  }
}

template <class T>
void forward(const RmsNormForwardArgs& args) {
  const int64_t d = args.x.dim(-1);
  const int64_t n_groups = args.inverse_rms.dim(1);
  const int64_t group_size = d / n_groups;
  const T* weight = args.weight.data<T>();
  parallel_for(rows_of(args.x.shape()), rows_per_task, [&](int64_t begin, int64_t end) {
    std::vector<T> v(d);
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = args.gate.defined() ? args.gate.data<T>() + row * d : nullptr;
      T* y = args.y.data<T>() + row * d;
      gated_row(args.x.data<T>() + row * d, gate, args.norm_before_gate, d, v.data());
      for (int64_t group = 0; group < n_groups; ++group) {
        const int64_t first = group * group_size;
        const T mean_square = dot_product(&v[first], &v[first], group_size) / static_cast<T>(group_size);
        const T inverse_rms = T{1} / std::sqrt(mean_square + static_cast<T>(args.epsilon));
        args.inverse_rms.data<T>()[row * n_groups + group] = inverse_rms;
        for (int64_t j = first; j < first + group_size; ++j) y[j] = v[j] * inverse_rms * weight[j];
      }
      if (gate != nullptr && args.norm_before_gate) {
        for (int64_t j = 0; j < d; ++j) y[j] *= silu(gate[j]);
      }
    }
  });
}

/// One row's working memory.
template <class T>
struct RowScratch {
  explicit RowScratch(int64_t d) : v(d), g_weight(d), gate_sigmoid(d) {}
  std::vector<T> v, g_weight, gate_sigmoid;
};

/// The gradients of one row; adds its part of grad_weight to `grad_weight`.
template <class T>
void backward_row(const RmsNormBackwardArgs& args, int64_t row, RowScratch<T>& scratch, T* grad_weight) {
  const int64_t d = args.x.dim(-1);
  const int64_t n_groups = args.inverse_rms.dim(1);
  const int64_t group_size = d / n_groups;
  const T* x = args.x.data<T>() + row * d;
  const T* gate = args.gate.defined() ? args.gate.data<T>() + row * d : nullptr;
  const T* weight = args.weight.data<T>();
  const T* grad_y = args.grad_y.data<T>() + row * d;
  T* grad_x = args.grad_x.data<T>() + row * d;
  T* grad_gate = gate != nullptr ? args.grad_gate.data<T>() + row * d : nullptr;
  const bool gate_first = gate != nullptr && !args.norm_before_gate;
  const bool gate_last = gate != nullptr && args.norm_before_gate;
  T* v = scratch.v.data();
  T* g_weight = scratch.g_weight.data();
  T* s = scratch.gate_sigmoid.data();  // computed once: the exponential is the dearest part of a gated row

  if (gate != nullptr) {
    for (int64_t j = 0; j < d; ++j) s[j] = sigmoid(gate[j]);
  }
  for (int64_t j = 0; j < d; ++j) v[j] = gate_first ? x[j] * gate[j] * s[j] : x[j];
  for (int64_t group = 0; group < n_groups; ++group) {
    const int64_t first = group * group_size, last = first + group_size;
    const T r = args.inverse_rms.data<T>()[row * n_groups + group];
    for (int64_t j = first; j < last; ++j) {
      const T g = gate_last ? grad_y[j] * gate[j] * s[j] : grad_y[j];
      grad_weight[j] += g * v[j] * r;
      g_weight[j] = g * weight[j];
    }
    const T mean = dot_product(g_weight + first, v + first, group_size) / static_cast<T>(group_size);
    for (int64_t j = first; j < last; ++j) grad_x[j] = r * (g_weight[j] - v[j] * r * r * mean);
    if (gate_last) {
      for (int64_t j = first; j < last; ++j) {
        grad_gate[j] = grad_y[j] * v[j] * r * weight[j] * s[j] * (T{1} + gate[j] * (T{1} - s[j]));
      }
    }
  }
  if (gate_first) {
    for (int64_t j = 0; j < d; ++j) {
      grad_gate[j] = grad_x[j] * x[j] * s[j] * (T{1} + gate[j] * (T{1} - s[j]));
      grad_x[j] *= gate[j] * s[j];
    }
  }
}

template <class T>
void backward(const RmsNormBackwardArgs& args) {
  const int64_t d = args.x.dim(-1);
  const RowBlocks blocks(rows_of(args.x.shape()));
  const Tensor partial = Tensor::zeros({blocks.n_blocks, d}, args.x.dtype());
  parallel_for_each(blocks.n_blocks, [&](int64_t block) {
    RowScratch<T> scratch(d);
    T* grad_weight = partial.data<T>() + block * d;
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
      backward_row(args, row, scratch, grad_weight);
    }
  });
  if (args.grad_weight.defined()) {
    sum_blocks(partial.data<T>(), blocks.n_blocks, d, args.accumulate_weight, args.grad_weight.data<T>());
  }
}

}  // namespace

void rms_norm_forward_cpu(const RmsNormForwardArgs& args) {
  dispatch_real(args.x.dtype(), "rms_norm", [&](auto element) { forward<decltype(element)>(args); });
}

void rms_norm_backward_cpu(const RmsNormBackwardArgs& args) {
  dispatch_real(args.x.dtype(), "rms_norm", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
