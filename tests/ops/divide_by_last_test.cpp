#include "ops/divide_by_last/divide_by_last.h"

#include <cmath>

#include "autograd/tape.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

constexpr double epsilon = 1e-2;

/// A row's last entry is between 0.5 and a few: what is divided by must stay away from 0.
Tensor rows_of_numbers(int64_t rows, int64_t d) {
  const Tensor x = random_tensor({rows, d + 1}, 1);
  for (int64_t row = 0; row < rows; ++row) {
    double& last = x.data<double>()[row * (d + 1) + d];
    last = 0.5 + std::abs(last);
  }
  return x;
}

std::vector<Variable> divided(const std::vector<Variable>& in) {
  return {divide_by_last(in[0], epsilon)};
}

}  // namespace

TEST_CASE("divide_by_last: gradient matches finite differences at odd sizes") {
  for (const int64_t rows : {1, 7, 100}) {
    for (const int64_t d : {1, 7, 31, 32, 33, 257}) {
      INFO("rows " << rows << ", d " << d);
      CHECK(check_gradient(divided, {rows_of_numbers(rows, d)}) == "");
      CHECK(check_cuda_bf16(divided, {rows_of_numbers(rows, d)}, {0}) == "");
    }
  }
  CHECK(check_jacobian(divided, {rows_of_numbers(2, 3)}) == "");
}

TEST_CASE("divide_by_last: epsilon is added to the last entry") {
  const Tensor x = Tensor::from_vector<double>({2, 3}, {3.0, -6.0, 2.5, 1.0, 2.0, 0.0});
  const Tensor y = divide_by_last(Variable(x), 0.5).value();
  CHECK(y.shape() == Shape{2, 2});
  CHECK(y.to_vector<double>() == std::vector<double>{1.0, -2.0, 2.0, 4.0});
}

TEST_CASE("divide_by_last: f32 agrees with f64") {
  const Tensor x = rows_of_numbers(100, 257);
  const auto value_and_gradient = [&](DType dtype) {
    const Variable leaf = Variable::leaf(x.to(dtype));
    Tape tape;
    const Variable y = divide_by_last(leaf, epsilon);
    tape.backward({y}, {random_tensor(y.shape(), 2).to(dtype)});
    return std::vector<Tensor>{y.value(), leaf.gradient().tensor()};
  };
  const std::vector<Tensor> f32 = value_and_gradient(DType::f32), f64 = value_and_gradient(DType::f64);
  // Rounding of the inputs, of a division, and of a sum of 257 products: a few units of 2^-24.
  for (size_t i = 0; i < 2; ++i) CHECK(relative_error(f32[i], f64[i]) < 10 * 6e-8);
}

TEST_CASE("divide_by_last: names what is wrong") {
  CHECK_THROWS_WITH(divide_by_last(Variable(random_tensor({4, 1}, 1)), epsilon),
                    "divide_by_last: x has shape (4, 1); it must be (..., d + 1), d at least 1");
}
