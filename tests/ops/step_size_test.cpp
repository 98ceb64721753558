#include "ops/step_size/step_size.h"

#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

CheckedFunction with(const StepSizeOptions& options) {
  return [=](const std::vector<Variable>& in) {
    const StepSizeOutput out = step_size(in[0], in[1], in.size() > 2 ? in[2] : Variable(), options);
    return std::vector<Variable>{out.dt, out.log_decay};
  };
}

}  // namespace

TEST_CASE("step_size: gradient matches finite differences at odd sizes") {
  for (const int64_t length : {1, 7, 100, 257}) {
    const std::vector<Tensor> inputs{random_tensor({2, length, 5}, 1, 2.0), random_tensor({5}, 2),
                                     random_tensor({5}, 3)};
    CHECK(check_gradient(with({}), inputs) == "");
    CHECK(check_gradient(with({.softplus = false}), {inputs[0], inputs[1]}) == "");
    CHECK(check_gradient(with({.limits = {0.2, 1.5}}), inputs) == "");
  }
  CHECK(check_jacobian(with({}),
                       {random_tensor({1, 2, 3}, 1), random_tensor({3}, 2), random_tensor({3}, 3)}) == "");
}

TEST_CASE("step_size: on a GPU, bf16, and around the heads that lie side by side") {
  for (const int64_t n_heads : {1, 31, 32, 33, 100, 255, 256, 257}) {
    const std::vector<Tensor> inputs{random_tensor({2, 300, n_heads}, 1, 2.0), random_tensor({n_heads}, 2),
                                     random_tensor({n_heads}, 3)};
    INFO(n_heads << " heads");
    CHECK(check_cuda(with({}), inputs) == "");
    CHECK(check_cuda_bf16(with({}), inputs, {0}, 4e-3) == "");
  }
  // What no gradient arrives at counts as zero.
  const auto only = [](int64_t output) {
    return [output](const std::vector<Variable>& in) {
      const std::vector<Variable> both = with({})(in);
      return std::vector<Variable>{both[output]};
    };
  };
  const std::vector<Tensor> inputs{random_tensor({2, 7, 5}, 1), random_tensor({5}, 2), random_tensor({5}, 3)};
  CHECK(check_gradient(only(0), inputs) == "");
  CHECK(check_gradient(only(1), inputs) == "");
}

TEST_CASE("step_size: large inputs do not overflow, limits hold") {
  const Variable x(Tensor::from_vector<float>({1, 1, 3}, {-200.0f, 0.0f, 200.0f}));
  const Variable A(Tensor::full({3}, -1.0, DType::f32));
  CHECK(step_size(x, A).dt.value().to_vector<float>()[2] == 200.0f);
  CHECK(step_size(x, A).dt.value().to_vector<float>()[0] == 0.0f);
  const std::vector<float> limited =
      step_size(x, A, {}, {.limits = {0.1, 3.0}}).dt.value().to_vector<float>();
  CHECK(limited == std::vector<float>{0.1f, std::log(2.0f), 3.0f});
}

TEST_CASE("step_size: names what is wrong") {
  const Variable x(random_tensor({1, 2, 3}, 1));
  CHECK_THROWS_WITH(step_size(x, Variable(random_tensor({2}, 1))),
                    "step_size: A has shape (2); it must be (n_heads) = (3)");
  CHECK_THROWS_WITH(step_size(x, Variable(random_tensor({3}, 1).to(DType::f32))),
                    "step_size: A is f32; beside f64 arguments it must be f64");
  CHECK_THROWS_WITH(step_size(x, Variable(random_tensor({3}, 1)), {}, {.limits = {2.0, 1.0}}),
                    "step_size: limits are [2, 1]; the first must not exceed the second");
}
