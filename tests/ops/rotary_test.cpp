#include "ops/rotary/rotary.h"

#include <cmath>

#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

/// Begins again in the middle, and is far along in the second row.
Tensor some_positions(int64_t length) {
  const Tensor positions = Tensor::empty({2, length}, DType::i32);
  for (int64_t t = 0; t < length; ++t) {
    positions.data<int32_t>()[t] = static_cast<int32_t>(t % 5);
    positions.data<int32_t>()[length + t] = static_cast<int32_t>(1000003 + t);
  }
  return positions;
}

CheckedFunction with(const Tensor& positions, const RotaryOptions& options) {
  return [=](const std::vector<Variable>& in) {
    return std::vector<Variable>{rotary(in[0], positions.to(in[0].device()), options)};
  };
}

const std::vector<RotaryOptions>& option_sets() {
  static const std::vector<RotaryOptions> sets{{.dim = 10},
                                               {.dim = 10, .interleaved = true},
                                               {.dim = 4, .base = 500.0},
                                               {.dim = 2, .interleaved = true}};
  return sets;
}

}  // namespace

TEST_CASE("rotary: gradient matches finite differences") {
  for (const RotaryOptions& options : option_sets()) {
    for (const int64_t length : {1, 7, 33}) {
      INFO("dim " << options.dim << ", length " << length);
      const std::vector<Tensor> inputs{random_tensor({2, length, 3, 10}, 1)};
      CHECK(check_gradient(with(some_positions(length), options), inputs) == "");
    }
  }
  CHECK(check_jacobian(with(some_positions(2), {.dim = 4}), {random_tensor({2, 2, 1, 5}, 1)}) == "");
}

TEST_CASE("rotary: bf16 on a GPU agrees with f64") {
  for (const RotaryOptions& options : option_sets()) {
    CHECK(check_cuda_bf16(with(some_positions(9), options), {random_tensor({2, 9, 3, 10}, 1)}, {0}) == "");
  }
}

TEST_CASE("rotary: pairs turn by their own frequency, halves or neighbours") {
  const Tensor x = Tensor::from_vector<double>({1, 1, 1, 5}, {1, 2, 3, 4, 5});
  const Tensor positions = Tensor::full({1, 1}, 3, DType::i32);
  const double fast = 3.0, slow = 3.0 / 100.0;
  const auto first = [](double a, double b, double angle) {
    return a * std::cos(angle) - b * std::sin(angle);
  };
  const auto second = [](double a, double b, double angle) {
    return a * std::sin(angle) + b * std::cos(angle);
  };
  CHECK(relative_error(
            rotary(Variable(x), positions, {.dim = 4}).value(),
            Tensor::from_vector<double>({1, 1, 1, 5}, {first(1, 3, fast), first(2, 4, slow),
                                                       second(1, 3, fast), second(2, 4, slow), 5})) < 1e-15);
  CHECK(relative_error(
            rotary(Variable(x), positions, {.dim = 4, .interleaved = true}).value(),
            Tensor::from_vector<double>({1, 1, 1, 5}, {first(1, 2, fast), second(1, 2, fast),
                                                       first(3, 4, slow), second(3, 4, slow), 5})) < 1e-15);
}

TEST_CASE("rotary: f32 agrees with f64 at large positions") {
  const Tensor x = random_tensor({2, 40, 3, 10}, 1), positions = some_positions(40);
  const RotaryOptions options{.dim = 10};
  // Two products and a sum of rounded numbers; the angles are exact.
  CHECK(relative_error(rotary(Variable(x.to(DType::f32)), positions, options).value(),
                       rotary(Variable(x), positions, options).value()) < 4 * 6e-8);
}

TEST_CASE("rotary: names what is wrong") {
  const Variable x(random_tensor({2, 3, 1, 6}, 1));
  const Tensor positions = Tensor::zeros({2, 3}, DType::i32);
  CHECK(input_error_of([&] {
          rotary(Variable(random_tensor({2, 3}, 1)), positions, {.dim = 2});
        }) == "rotary: x has shape (2, 3); it must be (batch, length, n_heads, head_dim)");
  CHECK(input_error_of([&] {
          rotary(x, Tensor::zeros({2, 4}, DType::i32), {.dim = 2});
        }) == "rotary: positions must be i32 (batch, length) = (2, 3)");
  for (const int64_t dim : {0, 3, 8}) {
    CHECK(input_error_of([&] { rotary(x, positions, {.dim = dim}); }) ==
          fmt::format("rotary: dim is {}; it must be even and from 2 to head_dim = 6", dim));
  }
  CHECK(input_error_of([&] { rotary(x, positions, {.dim = 2, .base = 0.0}); }) ==
        "rotary: base is 0; it must be above 0");
}
