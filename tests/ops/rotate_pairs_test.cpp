#include "ops/rotate_pairs/rotate_pairs.h"

#include <cmath>

#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

/// Cosines and sines of random angles.
Tensor random_rotation(int64_t batch, int64_t length, int64_t d) {
  const Tensor angles = random_tensor({batch, length, d / 2}, 2, 3.0);
  const Tensor rotation = Tensor::empty({batch, length, d / 2, 2}, DType::f64);
  for (int64_t i = 0; i < angles.numel(); ++i) {
    rotation.data<double>()[2 * i] = std::cos(angles.data<double>()[i]);
    rotation.data<double>()[2 * i + 1] = std::sin(angles.data<double>()[i]);
  }
  return rotation;
}

/// rotate_pairs with constants of the device and the dtype that x asks for.
CheckedFunction with(const Tensor& rotation, const Tensor& row_scale = {}, double factor = 1.0) {
  return [=](const std::vector<Variable>& in) {
    const auto like_x = [&](const Tensor& constant) {
      return constant.to(compute_dtype(in[0].dtype())).to(in[0].device());
    };
    return std::vector<Variable>{
        rotate_pairs(in[0], like_x(rotation), {.row_scale = like_x(row_scale), .factor = factor})};
  };
}

}  // namespace

TEST_CASE("rotate_pairs: gradient matches finite differences") {
  for (const int64_t length : {1, 7, 129}) {
    for (const int64_t d : {2, 4, 6, 8, 34}) {
      INFO("length " << length << ", d " << d);
      const Tensor x = random_tensor({2, length, 3, d}, 1), rotation = random_rotation(2, length, d);
      const Tensor row_scale = random_tensor({2, length, 3}, 4);
      CHECK(check_gradient(with(rotation), {x}) == "");
      CHECK(check_gradient(with(rotation, row_scale, 0.3), {x}) == "");
      CHECK(check_cuda_bf16(with(rotation, row_scale, 0.3), {x}, {0}) == "");
    }
  }
  CHECK(check_jacobian(with(random_rotation(1, 2, 4)), {random_tensor({1, 2, 2, 4}, 1)}) == "");
}

TEST_CASE("rotate_pairs: turns neighbouring pairs, and scales them") {
  const Tensor x = Tensor::from_vector<double>({1, 1, 2, 2}, {1.0, 0.0, 3.0, 4.0});
  const Tensor quarter = Tensor::from_vector<double>({1, 1, 1, 2}, {0.0, 1.0});
  const Tensor row_scale = Tensor::from_vector<double>({1, 1, 2}, {1.0, 10.0});
  const Tensor y = rotate_pairs(Variable(x), quarter, {.row_scale = row_scale, .factor = 2.0}).value();
  CHECK(y.to_vector<double>() == std::vector<double>{0.0, 2.0, -80.0, 60.0});
}

TEST_CASE("rotate_pairs: f32 agrees with f64") {
  const Tensor x = random_tensor({2, 65, 3, 16}, 1), rotation = random_rotation(2, 65, 16);
  const auto value = [&](DType dtype) { return with(rotation)({Variable(x.to(dtype))})[0].value(); };
  // Rounding of the inputs, the table and two products.
  CHECK(relative_error(value(DType::f32), value(DType::f64)) < 4 * 6e-8);
}

TEST_CASE("rotate_pairs: names what is wrong") {
  const Tensor rotation = random_rotation(2, 5, 4);
  const Variable x(random_tensor({2, 5, 3, 4}, 1));
  CHECK_THROWS_WITH(
      rotate_pairs(Variable(random_tensor({2, 5, 3, 3}, 1)), rotation),
      "rotate_pairs: x has shape (2, 5, 3, 3); it must be (batch, length, n_heads, d) with d even");
  CHECK_THROWS_WITH(
      rotate_pairs(x, random_rotation(2, 4, 4)),
      "rotate_pairs: rotation has shape (2, 4, 2, 2); it must be (batch, length, d / 2, 2) = (2, 5, 2, 2)");
  CHECK_THROWS_WITH(rotate_pairs(x, rotation.to(DType::f32)),
                    "rotate_pairs: rotation is f32; beside f64 arguments it must be f64");
  CHECK_THROWS_WITH(
      rotate_pairs(x, rotation, {.row_scale = random_tensor({2, 5, 4}, 1)}),
      "rotate_pairs: row_scale has shape (2, 5, 4); it must be (batch, length, n_heads) = (2, 5, 3)");
}
