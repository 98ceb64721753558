// The optimizer's arithmetic over flat buffers. (Nothing here has a gradient.)
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace headwater {

struct AdamWOptions {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  int64_t update = 1;           ///< counts from 1: the number of this update
  double gradient_scale = 1.0;  ///< gradients are multiplied by it first: clipping
};

/// One AdamW update, in one pass over the buffers:
///
///   g = gradient_scale * gradient      m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
///   value -= learning_rate * (m / (1 - beta1^update) / (sqrt(v / (1 - beta2^update)) + epsilon) + weight_decay * value)
///
/// Source   Loshchilov & Hutter 2019, arXiv:1711.05101 (decay decoupled from the gradient, times the learning
///          rate).
/// Shapes   all four (n); value, m and v are updated in place.
/// Dtypes   f32, f64.
/// Repeat   same inputs, same bits, whatever the number of threads.
void adamw_update(const Tensor& value, const Tensor& gradient, const Tensor& m, const Tensor& v,
                  const AdamWOptions& options);

/// The sum of the squares of all elements, in double precision, in an order that depends on the size alone. NaN or
/// infinite if an element is.
double sum_of_squares(const Tensor& values);

}  // namespace headwater
