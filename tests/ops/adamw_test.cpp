#include "ops/adamw/adamw.h"

#include <cmath>

#include "core/parallel.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

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
