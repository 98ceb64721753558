#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "ops/adamw/adamw_kernels.h"
#include "ops/lane_sums.h"

namespace headwater {
namespace {

constexpr int64_t elements_per_task = 16384;

template <class T>
void update(const AdamWArgs& args) {
  const double* plan = args.plan.data<double>();
  if (plan != nullptr && plan[plan_apply] == 0.0) return;
  const AdamWNumbers<T> o =
      adamw_numbers<T>(args.constants, plan != nullptr ? planned_step(plan) : args.step);
  T* value = args.value.data<T>();
  const T* gradient = args.gradient.data<T>();
  T* m = args.m.data<T>();
  T* v = args.v.data<T>();
  const T beta1 = o.beta1, beta2 = o.beta2, epsilon = o.epsilon, gradient_scale = o.gradient_scale;
  const T correction1 = o.correction1, correction2 = o.correction2;
  const T learning_rate = o.learning_rate, keep = o.keep;
  parallel_for(args.value.numel(), elements_per_task, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T g = gradient_scale * gradient[i];
      m[i] = beta1 * m[i] + (T{1} - beta1) * g;
      v[i] = beta2 * v[i] + (T{1} - beta2) * g * g;
      value[i] =
          keep * value[i] - learning_rate * (m[i] * correction1) / (std::sqrt(v[i] * correction2) + epsilon);
    }
  });
}

template <class T>
double sum(const Tensor& values) {
  const T* x = values.data<T>();
  const RowBlocks blocks(values.numel());
  std::vector<double> partial(blocks.n_blocks);
  parallel_for_each(blocks.n_blocks, [&](int64_t block) {
    const T* first = x + blocks.begin(block);
    partial[block] = lane_sum<double>(blocks.end(block) - blocks.begin(block), [=](int64_t i) {
      return static_cast<double>(first[i]) * static_cast<double>(first[i]);
    });
  });
  double total = 0.0;
  sum_blocks(partial.data(), blocks.n_blocks, 1, false, &total);
  return total;
}

}  // namespace

void adamw_cpu(const AdamWArgs& args) {
  dispatch_real(args.value.dtype(), "adamw_update", [&](auto element) { update<decltype(element)>(args); });
}

void plan_update_cpu(const PlanUpdateArgs& args) {
  dispatch_real(args.loss.dtype(), "plan_update", [&](auto element) {
    write_plan(*args.gradient_squares.data<double>(), *args.loss.data<decltype(element)>(),
               args.schedule.data<double>(), args.plan.data<double>());
  });
}

void sum_of_squares_cpu(const SumOfSquaresArgs& args) {
  dispatch_real(args.values.dtype(), "sum_of_squares",
                [&](auto element) { *args.sum.data<double>() = sum<decltype(element)>(args.values); });
}

}  // namespace headwater
