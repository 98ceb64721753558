#include "ops/rearrange/rearrange.h"

#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

TEST_CASE("rearrange: gradients match finite differences") {
  const auto concat = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{concat_last(in[0], in[1])};
  };
  const auto narrow = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{narrow_last(in[0], 2, 6)};
  };
  const auto transpose = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{transpose_last(in[0])};
  };
  const auto repeat = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{repeat_leading(in[0], 3)};
  };
  const auto other_shape = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{reshape(in[0], {4, 3})};
  };
  CHECK(check_gradient(concat, {random_tensor({2, 7, 3}, 1), random_tensor({2, 7, 100}, 2)}) == "");
  CHECK(check_gradient(narrow, {random_tensor({2, 7, 9}, 1)}) == "");
  CHECK(check_gradient(transpose, {random_tensor({3, 7, 257}, 1)}) == "");
  CHECK(check_gradient(repeat, {random_tensor({7, 5}, 1)}) == "");
  CHECK(check_jacobian(other_shape, {random_tensor({2, 6}, 1)}) == "");
}

TEST_CASE("rearrange: on a GPU, f32 and bf16, around the sizes that move at once") {
  const auto concat = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{concat_last(in[0], in[1])};
  };
  const auto transpose = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{transpose_last(in[0])};
  };
  const auto repeat = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{repeat_leading(in[0], 5)};
  };
  // Of the values, not a bit may change: the tolerance is for the sum that is the gradient of repeat_leading.
  for (const int64_t width : {1, 3, 4, 8, 12, 16, 520}) {
    for (const int64_t other : {4, 5, 8}) {
      const std::vector<Tensor> inputs{random_tensor({2, 9, width}, 1), random_tensor({2, 9, other}, 2)};
      INFO("widths " << width << " and " << other);
      CHECK(check_cuda(concat, inputs, 0.0) == "");
      CHECK(check_cuda_bf16(concat, inputs, {0, 1}, 0.0) == "");
    }
    CHECK(check_cuda_bf16(repeat, {random_tensor({7, width}, 1)}, {0}, 4e-3) == "");
  }
  for (const int64_t m : {1, 31, 32, 33, 65}) {
    for (const int64_t n : {1, 31, 32, 33, 65}) {
      INFO("m " << m << ", n " << n);
      CHECK(check_cuda(transpose, {random_tensor({2, m, n}, 1)}, 0.0) == "");
      CHECK(check_cuda_bf16(transpose, {random_tensor({2, m, n}, 1)}, {0}, 0.0) == "");
    }
  }
}

TEST_CASE("rearrange: elements land where they should") {
  const Variable a(Tensor::from_vector<double>({2, 1}, {1, 2})),
      b(Tensor::from_vector<double>({2, 2}, {3, 4, 5, 6}));
  CHECK(concat_last(a, b).value().to_vector<double>() == std::vector<double>{1, 3, 4, 2, 5, 6});
  CHECK(narrow_last(b, 1, 2).value().to_vector<double>() == std::vector<double>{4, 6});
  CHECK(transpose_last(b).value().to_vector<double>() == std::vector<double>{3, 5, 4, 6});
  CHECK_THROWS_WITH(narrow_last(b, 1, 3), "narrow_last: [1, 3) is not a range of 2 columns");
  CHECK(repeat_leading(a, 2).value().to_vector<double>() == std::vector<double>{1, 2, 1, 2});
  CHECK_THROWS_WITH(
      concat_last(a, Variable(random_tensor({3, 2}, 1))),
      "concat_last: b has shape (3, 2); it must be the shape of a but for the last axis = (2, 2)");
}
