#include "ops/adamw/adamw.h"

#include <cmath>

#include "core/parallel.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

/// Buffers of `n` elements from element `first` on of their memory, drawn afresh with the same numbers.
struct Buffers {
  Buffers(int64_t n, DType dtype, Device device, int64_t first = 0) {
    const auto draw = [&](uint64_t stream) {
      return random_tensor({first + n}, stream).to(dtype).to(device).clone().narrow(first, first + n);
    };
    value = draw(1);
    gradient = draw(2);
    m = draw(3);
    v = draw(4);
    // Squares are not negative.
    const Tensor squares = v.to(Device{}).to(DType::f64).clone();
    for (int64_t i = 0; i < n; ++i) squares.data<double>()[i] = std::abs(squares.data<double>()[i]);
    v.copy_from(squares.to(dtype).to(device));
  }
  std::vector<std::vector<double>> contents() const {
    return {value.to_vector<double>(), m.to_vector<double>(), v.to_vector<double>()};
  }
  Tensor value, gradient, m, v;
};

std::vector<Device> all_devices() {
  std::vector<Device> devices{Device{}};
  if (has_cuda()) devices.push_back(parse_device("cuda"));
  return devices;
}

/// The plan for these numbers, as to_vector.
std::vector<double> planned(double squares, double loss, DType loss_dtype,
                            const std::vector<double>& schedule, Device device) {
  const Tensor plan = Tensor::zeros({5}, DType::f64, device);
  plan_update(Tensor::from_vector<double>({1}, {squares}).to(device),
              Tensor::from_vector<double>({}, {loss}).to(loss_dtype).to(device),
              Tensor::from_vector<double>({4}, schedule).to(device), plan);
  return plan.to_vector<double>();
}

}  // namespace

TEST_CASE("adamw: three updates written out") {
  const Tensor value = Tensor::from_vector<double>({1}, {2.0}), m = Tensor::zeros({1}, DType::f64),
               v = zeros_like(m);
  double x = 2.0, first = 0.0, second = 0.0;
  for (int64_t update = 1; update <= 3; ++update) {
    const double g = 0.5 * static_cast<double>(update) * x;  // clipped by 0.5
    adamw_update(value, Tensor::from_vector<double>({1}, {static_cast<double>(update) * x}), m, v,
                 {.learning_rate = 0.1,
                  .beta1 = 0.8,
                  .beta2 = 0.9,
                  .epsilon = 1e-3,
                  .weight_decay = 0.2,
                  .update = update,
                  .gradient_scale = 0.5});
    first = 0.8 * first + 0.2 * g;
    second = 0.9 * second + 0.1 * g * g;
    const double n = static_cast<double>(update);
    const double direction =
        first / (1 - std::pow(0.8, n)) / (std::sqrt(second / (1 - std::pow(0.9, n))) + 1e-3);
    x -= 0.1 * (direction + 0.2 * x);
    CHECK(value.data<double>()[0] == Approx(x).epsilon(1e-14));
  }
}

TEST_CASE("adamw: the sum of squares, its bits whatever the threads, and NaN") {
  const Tensor values = random_tensor({10007}, 1).to(DType::f32);
  double expected = 0.0;
  for (const double x : values.to_vector<double>()) expected += x * x;
  const int before = n_threads();
  set_n_threads(1);
  const double one = sum_of_squares(values);
  set_n_threads(3);
  const double three = sum_of_squares(values);
  set_n_threads(before);
  CHECK(one == three);
  CHECK(one == Approx(expected).epsilon(1e-12));
  values.data<float>()[777] = NAN;
  CHECK(std::isnan(sum_of_squares(values)));
}

TEST_CASE("adamw: a GPU agrees with the CPU in f64, and rounds the new values to bf16") {
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  const AdamWOptions options{.learning_rate = 0.1, .weight_decay = 0.2, .update = 3, .gradient_scale = 0.5};
  for (const int64_t n : {0, 1, 3, 4, 5, 1023, 1029}) {
    for (const int64_t first : {0, 1, 4}) {
      INFO(n << " elements, from element " << first << " on");
      const Buffers on_gpu(n, DType::f32, gpu, first);
      Buffers on_cpu(n, DType::f32, Device{}, first);
      for (Tensor* buffer : {&on_cpu.value, &on_cpu.gradient, &on_cpu.m, &on_cpu.v})
        *buffer = buffer->to(DType::f64);
      const Tensor copy = Tensor::empty({first + n}, DType::bf16, gpu).narrow(first, first + n);
      adamw_update(on_gpu.value, on_gpu.gradient, on_gpu.m, on_gpu.v, options, copy);
      adamw_update(on_cpu.value, on_cpu.gradient, on_cpu.m, on_cpu.v, options);
      // About ten operations, each rounded to 2^-24.
      CHECK(relative_error(on_gpu.value, on_cpu.value) < 10 * 6e-8);
      CHECK(relative_error(on_gpu.m, on_cpu.m) < 10 * 6e-8);
      CHECK(relative_error(on_gpu.v, on_cpu.v) < 10 * 6e-8);
      CHECK(copy.to_vector<float>() == on_gpu.value.to(DType::bf16).to_vector<float>());
    }
  }
}

TEST_CASE("adamw: a plan with equal numbers gives the bits of adamw_update") {
  const int64_t n = 1029;
  for (const Device device : all_devices()) {
    for (const DType dtype : {DType::f32, DType::f64}) {
      if (device.is_cuda() && dtype == DType::f64) continue;
      const double learning_rate = 0.013, gradient_scale = 0.7;
      const double beta1 = 0.5, beta2 = 0.75;
      for (const double weight_decay : {0.0, 0.1}) {
        INFO(to_string(device) << ", " << name_of(dtype) << ", weight decay " << weight_decay);
        const Buffers plain(n, dtype, device), with_plan(n, dtype, device), skipped(n, dtype, device);
        const auto before = skipped.contents();
        adamw_update(plain.value, plain.gradient, plain.m, plain.v,
                     {.learning_rate = learning_rate * 0.3,
                      .beta1 = beta1,
                      .beta2 = beta2,
                      .weight_decay = weight_decay,
                      .gradient_scale = gradient_scale});
        const AdamWConstants constants{
            .beta1 = beta1, .beta2 = beta2, .weight_decay = weight_decay, .learning_rate_scale = 0.3};
        const auto plan = [&](double apply) {
          return Tensor::from_vector<double>({5}, {learning_rate, 2.0, 4.0, gradient_scale, apply})
              .to(device);
        };
        adamw_update_planned(with_plan.value, with_plan.gradient, with_plan.m, with_plan.v, {}, constants,
                             plan(1.0));
        CHECK(with_plan.contents() == plain.contents());
        CHECK(with_plan.contents() != before);
        adamw_update_planned(skipped.value, skipped.gradient, skipped.m, skipped.v, {}, constants, plan(0.0));
        CHECK(skipped.contents() == before);
      }
    }
  }
  CHECK(adamw_correction(0.5, 1) == 2.0);
  CHECK(adamw_correction(0.5, 2) == 1.0 / 0.75);
}

TEST_CASE("adamw: a plan clips by the norm, and applies nothing that is not finite") {
  const double infinity = INFINITY;
  for (const Device device : all_devices()) {
    for (const DType loss : {DType::f32, DType::f64}) {
      INFO(to_string(device) << ", loss in " << name_of(loss));
      const std::vector<double> clipping{0.25, 2.0, 3.0, 1.5}, open{0.25, 2.0, 3.0, 0.0};
      CHECK(planned(9.0, 1.0, loss, clipping, device) == std::vector<double>{0.25, 2.0, 3.0, 0.5, 1.0});
      CHECK(planned(9.0, 1.0, loss, open, device) == std::vector<double>{0.25, 2.0, 3.0, 1.0, 1.0});
      CHECK(planned(2.25, 1.0, loss, clipping, device) == std::vector<double>{0.25, 2.0, 3.0, 1.0, 1.0});
      CHECK(planned(0.0, 1.0, loss, clipping, device)[3] == 1.0);
      CHECK(planned(1.0, NAN, loss, clipping, device)[4] == 0.0);
      CHECK(planned(1.0, infinity, loss, clipping, device)[4] == 0.0);
      CHECK(planned(1.0, -infinity, loss, clipping, device)[4] == 0.0);
      CHECK(planned(NAN, 1.0, loss, clipping, device)[4] == 0.0);
      CHECK(planned(infinity, 1.0, loss, clipping, device)[4] == 0.0);
    }
  }
}

TEST_CASE("adamw: the sum of squares on a GPU, wherever the values begin") {
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  for (const int64_t n : {0, 1, 3, 4, 5, 1023, 1024, 1025, 10007}) {
    INFO(n << " elements");
    const Tensor values = random_tensor({n}, 1).to(DType::f32);
    const Tensor moved = Tensor::zeros({n + 1}, DType::f32, gpu).narrow(1, n + 1);
    moved.copy_from(values);
    const double sum = sum_of_squares(values.to(gpu));
    CHECK(sum == Approx(sum_of_squares(values)).epsilon(1e-14));
    CHECK(sum_of_squares(moved) == sum);
    CHECK(sum_of_squares_of(moved).device() == gpu);
  }
  CHECK(std::isnan(sum_of_squares(Tensor::full({100}, NAN, DType::f32, gpu))));
  CHECK(std::isinf(sum_of_squares(Tensor::full({100}, INFINITY, DType::f32, gpu))));
}

TEST_CASE("adamw: names what is wrong") {
  const Buffers b(3, DType::f64, Device{});
  CHECK_THROWS_WITH(adamw_update(b.value, b.gradient.to(DType::f32), b.m, b.v, {}),
                    "adamw_update: a buffer is f32 (3); all must be f64 (3) like the values");
  CHECK_THROWS_WITH(adamw_update(b.value, b.gradient, b.m, b.v, {}, b.value.to(DType::bf16)),
                    "adamw_update: bf16_copy is for a GPU; on the CPU there is none");
  CHECK_THROWS_WITH(adamw_update_planned(b.value, b.gradient, b.m, b.v, {}, {}, b.value),
                    "adamw_update_planned: plan is f64 (3) on cpu; it must be f64 (5) on cpu");
  const Tensor plan = Tensor::zeros({5}, DType::f64), schedule = Tensor::zeros({4}, DType::f64);
  CHECK_THROWS_WITH(plan_update(schedule, plan, schedule, plan),
                    "plan_update: gradient_squares is f64 (4) on cpu; it must be f64 (1) on cpu");
  CHECK_THROWS_WITH(plan_update(sum_of_squares_of(b.value), plan, schedule, plan),
                    "plan_update: loss has shape (5) on cpu; it must be one element on cpu");
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  const Buffers c(3, DType::f64, gpu);
  CHECK_THROWS_WITH(adamw_update(c.value, c.gradient, c.m, c.v, {}),
                    "adamw_update: dtype f64 is not supported on a GPU; use f32");
  CHECK_THROWS_WITH(adamw_update(c.value, b.gradient, c.m, c.v, {}),
                    "adamw_update: a buffer is on cpu; all must be on cuda:0 like the values");
}
