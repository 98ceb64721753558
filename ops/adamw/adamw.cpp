#include "ops/adamw/adamw.h"

#include <cmath>

#include "core/error.h"
#include "ops/adamw/adamw_kernels.h"

namespace headwater {
namespace {

void check_buffer(const char* op, const Tensor& buffer, DType dtype, const Tensor& value) {
  require(buffer.shape() == value.shape() && buffer.dtype() == dtype,
          "{}: a buffer is {} {}; all must be {} {} like the values", op, name_of(buffer.dtype()),
          buffer.shape(), name_of(dtype), value.shape());
  require(buffer.device() == value.device(), "{}: a buffer is on {}; all must be on {} like the values", op,
          to_string(buffer.device()), to_string(value.device()));
}

void check_buffers(const char* op, const AdamWArgs& args) {
  for (const Tensor& other : {args.gradient, args.m, args.v}) {
    check_buffer(op, other, args.value.dtype(), args.value);
  }
  if (!args.bf16_copy.defined()) return;
  require(args.value.device().is_cuda(), "{}: bf16_copy is for a GPU; on the CPU there is none", op);
  require(args.bf16_copy.shape() == args.value.shape() && args.bf16_copy.dtype() == DType::bf16 &&
              args.bf16_copy.device() == args.value.device(),
          "{}: bf16_copy is {} {} on {}; it must be bf16 {} on {}", op, name_of(args.bf16_copy.dtype()),
          args.bf16_copy.shape(), to_string(args.bf16_copy.device()), args.value.shape(),
          to_string(args.value.device()));
}

void check_numbers(const char* op, const char* argument, const Tensor& numbers, DType dtype, int64_t size,
                   Device device) {
  require(numbers.shape() == Shape{size} && numbers.dtype() == dtype && numbers.device() == device,
          "{}: {} is {} {} on {}; it must be {} ({}) on {}", op, argument, name_of(numbers.dtype()),
          numbers.shape(), to_string(numbers.device()), name_of(dtype), size, to_string(device));
}

}  // namespace

void adamw_update(const Tensor& value, const Tensor& gradient, const Tensor& m, const Tensor& v,
                  const AdamWOptions& options, const Tensor& bf16_copy) {
  const AdamWArgs args{value,
                       gradient,
                       m,
                       v,
                       bf16_copy,
                       {.beta1 = options.beta1,
                        .beta2 = options.beta2,
                        .epsilon = options.epsilon,
                        .weight_decay = options.weight_decay},
                       {.learning_rate = options.learning_rate,
                        .correction1 = adamw_correction(options.beta1, options.update),
                        .correction2 = adamw_correction(options.beta2, options.update),
                        .gradient_scale = options.gradient_scale},
                       {}};
  check_buffers("adamw_update", args);
  adamw_kernel(value.device(), args);
}

void adamw_update_planned(const Tensor& value, const Tensor& gradient, const Tensor& m, const Tensor& v,
                          const Tensor& bf16_copy, const AdamWConstants& constants, const Tensor& plan) {
  const AdamWArgs args{value, gradient, m, v, bf16_copy, constants, {}, plan};
  check_buffers("adamw_update_planned", args);
  check_numbers("adamw_update_planned", "plan", plan, DType::f64, plan_size, value.device());
  adamw_kernel(value.device(), args);
}

double adamw_correction(double beta, int64_t update) {
  return 1.0 / (1.0 - std::pow(beta, static_cast<double>(update)));
}

void plan_update(const Tensor& gradient_squares, const Tensor& loss, const Tensor& schedule,
                 const Tensor& plan) {
  const Device device = plan.device();
  check_numbers("plan_update", "plan", plan, DType::f64, plan_size, device);
  check_numbers("plan_update", "gradient_squares", gradient_squares, DType::f64, 1, device);
  check_numbers("plan_update", "schedule", schedule, DType::f64, schedule_size, device);
  require(loss.numel() == 1 && loss.device() == device,
          "plan_update: loss has shape {} on {}; it must be one element on {}", loss.shape(),
          to_string(loss.device()), to_string(device));
  plan_update_kernel(device, {gradient_squares, loss, schedule, plan});
}

double sum_of_squares(const Tensor& values) {
  return sum_of_squares_of(values).to_vector<double>()[0];
}

Tensor sum_of_squares_of(const Tensor& values) {
  const Tensor sum = Tensor::empty({1}, DType::f64, values.device());
  sum_of_squares_kernel(values.device(), {values, sum});
  return sum;
}

}  // namespace headwater
