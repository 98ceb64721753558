#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "ops/check.h"
#include "ops/lane_sums.h"
#include "ops/layer_norm/layer_norm_kernels.h"

// One row is in a core's first-level cache while it is worked on, so several short loops over it cost little
// more than one long one, and each of them vectorises.

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 16;

template <class T>
void forward(const LayerNormForwardArgs& args) {
  const int64_t d = args.x.dim(-1);
  const T* weight = args.weight.data<T>();
  const T* bias = args.bias.data<T>();
  const T epsilon = static_cast<T>(args.epsilon);
  parallel_for(rows_of(args.x.shape()), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = args.x.data<T>() + row * d;
      T* y = args.y.data<T>() + row * d;
      const T mean = lane_sum<T>(d, [=](int64_t j) { return x[j]; }) / static_cast<T>(d);
      const T variance =
          lane_sum<T>(d, [=](int64_t j) { return (x[j] - mean) * (x[j] - mean); }) / static_cast<T>(d);
      const T inverse_std = T{1} / std::sqrt(variance + epsilon);
      args.mean.data<T>()[row] = mean;
      args.inverse_std.data<T>()[row] = inverse_std;
      for (int64_t j = 0; j < d; ++j) y[j] = (x[j] - mean) * inverse_std * weight[j] + bias[j];
    }
  });
}

/// The gradient of one row of x; adds the row's part of the others to `grad_weight` and `grad_bias`.
template <class T>
void backward_row(const LayerNormBackwardArgs& args, int64_t row, T* normalised, T* g, T* grad_weight,
                  T* grad_bias) {
  const int64_t d = args.x.dim(-1);
  const T* x = args.x.data<T>() + row * d;
  const T* weight = args.weight.data<T>();
  const T* grad_y = args.grad_y.data<T>() + row * d;
  T* grad_x = args.grad_x.data<T>() + row * d;
  const T mean = args.mean.data<T>()[row];
  const T r = args.inverse_std.data<T>()[row];

  for (int64_t j = 0; j < d; ++j) {
    normalised[j] = (x[j] - mean) * r;
    g[j] = grad_y[j] * weight[j];
  }
  for (int64_t j = 0; j < d; ++j) grad_weight[j] += grad_y[j] * normalised[j];
  for (int64_t j = 0; j < d; ++j) grad_bias[j] += grad_y[j];
  const T mean_g = lane_sum<T>(d, [=](int64_t j) { return g[j]; }) / static_cast<T>(d);
  const T mean_gn = lane_sum<T>(d, [=](int64_t j) { return g[j] * normalised[j]; }) / static_cast<T>(d);
  for (int64_t j = 0; j < d; ++j) grad_x[j] = r * (g[j] - mean_g - normalised[j] * mean_gn);
}

template <class T>
void backward(const LayerNormBackwardArgs& args) {
  const int64_t d = args.x.dim(-1);
  const RowBlocks blocks(rows_of(args.x.shape()));
  const Tensor weight_parts = Tensor::zeros({blocks.n_blocks, d}, args.x.dtype());
  const Tensor bias_parts = Tensor::zeros({blocks.n_blocks, d}, args.x.dtype());
  parallel_for_each(blocks.n_blocks, [&](int64_t block) {
    std::vector<T> normalised(d), g(d);
    T* grad_weight = weight_parts.data<T>() + block * d;
    T* grad_bias = bias_parts.data<T>() + block * d;
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
      backward_row(args, row, normalised.data(), g.data(), grad_weight, grad_bias);
    }
  });
  if (args.grad_weight.defined()) {
    sum_blocks(weight_parts.data<T>(), blocks.n_blocks, d, args.accumulate_weight,
               args.grad_weight.data<T>());
  }
  if (args.grad_bias.defined()) {
    sum_blocks(bias_parts.data<T>(), blocks.n_blocks, d, args.accumulate_bias, args.grad_bias.data<T>());
  }
}

}  // namespace

void layer_norm_forward_cpu(const LayerNormForwardArgs& args) {
  dispatch_real(args.x.dtype(), "layer_norm", [&](auto element) { forward<decltype(element)>(args); });
}

void layer_norm_backward_cpu(const LayerNormBackwardArgs& args) {
  dispatch_real(args.x.dtype(), "layer_norm", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater
