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
/// Shapes   all (n); value, m and v are updated in place; bf16_copy, which may be undefined, receives the new values.
/// Dtypes   f32, f64; on a GPU f32. bf16_copy: bf16, on a GPU only.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a buffer of another shape, dtype or device.
void adamw_update(const Tensor& value, const Tensor& gradient, const Tensor& m, const Tensor& v,
                  const AdamWOptions& options, const Tensor& bf16_copy = {});

/// What an update that is planned is given by the host: nothing that changes from step to step.
struct AdamWConstants {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  double learning_rate_scale = 1.0;
};

/// adamw_update with the numbers that change from step to step read from `plan`, on the device of the buffers: what a
/// captured step can replay. Equal numbers give the bits of adamw_update.
///
/// plan: f64 (5), as plan_update writes it
///   0  learning_rate, to be multiplied by learning_rate_scale      1, 2  adamw_correction of beta1 and beta2
///   3  gradient_scale                                              4     1, or 0: nothing is changed
void adamw_update_planned(const Tensor& value, const Tensor& gradient, const Tensor& m, const Tensor& v,
                          const Tensor& bf16_copy, const AdamWConstants& constants, const Tensor& plan);

/// 1 / (1 - beta^update).
double adamw_correction(double beta, int64_t update);

/// Writes `plan` on its device, from what is known there at the end of a step:
///
///   norm = sqrt(gradient_squares)      gradient_scale = max_grad_norm / norm if norm > max_grad_norm > 0, else 1
///   apply = 1 if loss and norm are finite, else 0
///
/// Shapes   gradient_squares: (1)   loss: one element   schedule: (4): learning_rate, the corrections of beta1 and
///          beta2, max_grad_norm (0: no clipping)   plan: (5).
/// Dtypes   loss: f32, f64   gradient_squares, schedule, plan: f64.
/// Throws   an input error for a wrong shape, dtype or device; the text names the argument.
void plan_update(const Tensor& gradient_squares, const Tensor& loss, const Tensor& schedule,
                 const Tensor& plan);

/// The sum of the squares of all elements, in double precision, in an order that depends on the size alone. NaN or
/// infinite if an element is. values: any shape, f32 or f64, on a GPU f32. The second leaves the sum, f64 (1), on the
/// device.
double sum_of_squares(const Tensor& values);
Tensor sum_of_squares_of(const Tensor& values);

}  // namespace headwater
