// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include <cmath>

#include "core/kernel.h"
#include "core/tensor.h"
#include "ops/adamw/adamw.h"

namespace headwater {

/// What changes from step to step.
struct AdamWStep {
  double learning_rate = 0.0;
  double correction1 = 0.0, correction2 = 0.0;
  double gradient_scale = 1.0;
};

struct AdamWArgs {
  Tensor value, gradient, m, v;  // (n); all but gradient are updated
  Tensor bf16_copy;              // (n), written; undefined if not wanted
  AdamWConstants constants;
  AdamWStep step;
  Tensor plan;  // f64 (5), read in place of `step`; or undefined
};

struct PlanUpdateArgs {
  Tensor gradient_squares;  // f64 (1)
  Tensor loss;              // one element
  Tensor schedule;          // f64 (4)
  Tensor plan;              // f64 (5), written
};

struct SumOfSquaresArgs {
  Tensor values;
  Tensor sum;  // f64 (1), written
};

void adamw_cpu(const AdamWArgs& args);
void adamw_cuda(const AdamWArgs& args);
void plan_update_cpu(const PlanUpdateArgs& args);
void plan_update_cuda(const PlanUpdateArgs& args);
void sum_of_squares_cpu(const SumOfSquaresArgs& args);
void sum_of_squares_cuda(const SumOfSquaresArgs& args);

inline constexpr Kernel<AdamWArgs> adamw_kernel{"adamw", adamw_cpu, HEADWATER_CUDA(adamw_cuda)};
inline constexpr Kernel<PlanUpdateArgs> plan_update_kernel{"plan_update", plan_update_cpu,
                                                           HEADWATER_CUDA(plan_update_cuda)};
inline constexpr Kernel<SumOfSquaresArgs> sum_of_squares_kernel{"sum_of_squares", sum_of_squares_cpu,
                                                                HEADWATER_CUDA(sum_of_squares_cuda)};

// ---- what all kernels compute alike, on the host and in kernels

enum PlanEntry {
  plan_learning_rate,
  plan_correction1,
  plan_correction2,
  plan_gradient_scale,
  plan_apply,
  plan_size
};
enum ScheduleEntry {
  schedule_learning_rate,
  schedule_correction1,
  schedule_correction2,
  schedule_max_grad_norm,
  schedule_size
};

HEADWATER_HOST_DEVICE inline AdamWStep planned_step(const double* plan) {
  return {plan[plan_learning_rate], plan[plan_correction1], plan[plan_correction2],
          plan[plan_gradient_scale]};
}

/// The numbers of an update in the dtype of its arithmetic.
template <class T>
struct AdamWNumbers {
  T beta1, beta2, epsilon;
  T learning_rate, correction1, correction2, gradient_scale;
  T keep;  ///< of the value, after weight decay
};

/// The fma is written out so that no compiler has a choice: the same bits from a plan and without one.
template <class T>
HEADWATER_HOST_DEVICE inline AdamWNumbers<T> adamw_numbers(const AdamWConstants& constants,
                                                           const AdamWStep& step) {
  const double learning_rate = step.learning_rate * constants.learning_rate_scale;
  return {
      static_cast<T>(constants.beta1),     static_cast<T>(constants.beta2),
      static_cast<T>(constants.epsilon),   static_cast<T>(learning_rate),
      static_cast<T>(step.correction1),    static_cast<T>(step.correction2),
      static_cast<T>(step.gradient_scale), static_cast<T>(fma(-learning_rate, constants.weight_decay, 1.0))};
}

HEADWATER_HOST_DEVICE inline bool is_finite(double x) {
  return x - x == 0.0;
}

HEADWATER_HOST_DEVICE inline void write_plan(double gradient_squares, double loss, const double* schedule,
                                             double* plan) {
  const double norm = sqrt(gradient_squares), max_norm = schedule[schedule_max_grad_norm];
  plan[plan_learning_rate] = schedule[schedule_learning_rate];
  plan[plan_correction1] = schedule[schedule_correction1];
  plan[plan_correction2] = schedule[schedule_correction2];
  plan[plan_gradient_scale] = max_norm > 0.0 && norm > max_norm ? max_norm / norm : 1.0;
  plan[plan_apply] = is_finite(loss) && is_finite(norm) ? 1.0 : 0.0;
}

}  // namespace headwater
