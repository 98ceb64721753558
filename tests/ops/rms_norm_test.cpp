#include "ops/rms_norm/rms_norm.h"

#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

CheckedFunction with_options(const RmsNormOptions& options) {
  return [options](const std::vector<Variable>& inputs) {
    return std::vector<Variable>{
        rms_norm(inputs[0], inputs[1], inputs.size() > 2 ? inputs[2] : Variable(), options)};
  };
}

std::vector<Tensor> inputs_of(int64_t rows, int64_t d, bool gated) {
  std::vector<Tensor> inputs{random_tensor({rows, d}, 1), random_tensor({d}, 2)};
  if (gated) inputs.push_back(random_tensor({rows, d}, 3));
  return inputs;
}

}  // namespace

TEST_CASE("rms_norm: gradient matches finite differences at odd sizes") {
  // With one channel y is nearly the sign of x: a wide epsilon makes it smooth on the scale of the
  // differences' step.
  const double epsilon = 0.1;
  for (const int64_t rows : {1, 7, 100, 257}) {
    for (const int64_t d : {1, 7, 33}) {
      INFO("rows " << rows << ", d " << d);
      CHECK(check_gradient(with_options({.epsilon = epsilon}), inputs_of(rows, d, false)) == "");
      CHECK(check_gradient(with_options({.epsilon = epsilon}), inputs_of(rows, d, true)) == "");
      CHECK(check_gradient(with_options({.epsilon = epsilon, .norm_before_gate = true}),
                           inputs_of(rows, d, true)) == "");
    }
  }
}

TEST_CASE("rms_norm: bf16 on a GPU agrees with f64") {
  for (const bool norm_before_gate : {false, true}) {
    const RmsNormOptions options{.n_groups = 3, .norm_before_gate = norm_before_gate};
    CHECK(check_cuda_bf16(with_options(options), inputs_of(7, 33, true), {0, 2}) == "");
  }
  // An f32 residual stream that a bf16 layer reads.
  const auto to_bf16 = [](const std::vector<Variable>& inputs) {
    const bool on_cpu = inputs[0].device().is_cpu();
    return with_options({.output_dtype = on_cpu ? DType::f64 : DType::bf16})(inputs);
  };
  CHECK(check_cuda_bf16(to_bf16, inputs_of(7, 257, false), {}) == "");
}

TEST_CASE("rms_norm: every entry of the Jacobian") {
  const RmsNormOptions grouped{.epsilon = 1e-2, .n_groups = 3};
  CHECK(check_jacobian(with_options(grouped), inputs_of(2, 6, true)) == "");
}

TEST_CASE("rms_norm: a group is normalised by itself") {
  const Tensor x = Tensor::from_vector<double>({1, 4}, {3.0, 4.0, 0.3, 0.4});
  const Tensor weight = Tensor::full({4}, 1.0, DType::f64);
  const Variable y = rms_norm(Variable(x), Variable(weight), {}, {.epsilon = 0.0, .n_groups = 2});
  const double rms = std::sqrt(12.5);
  const Tensor expected = Tensor::from_vector<double>({1, 4}, {3 / rms, 4 / rms, 3 / rms, 4 / rms});
  CHECK(relative_error(y.value(), expected) < 1e-14);
}

TEST_CASE("rms_norm: f32 agrees with f64") {
  const std::vector<Tensor> inputs = inputs_of(100, 257, true);
  const auto run = [&](DType dtype) {
    std::vector<Variable> converted;
    for (const Tensor& input : inputs) converted.emplace_back(input.to(dtype));
    return rms_norm(converted[0], converted[1], converted[2]).value();
  };
  // Rounding of the inputs, of 257 additions and of silu: a few units of 2^-24.
  CHECK(relative_error(run(DType::f32), run(DType::f64)) < 10 * 6e-8);
}

TEST_CASE("rms_norm: names what is wrong") {
  const Variable x(random_tensor({2, 6}, 1));
  CHECK_THROWS_WITH(rms_norm(x, Variable(random_tensor({5}, 2))),
                    "rms_norm: weight has shape (5); it must be (d) = (6)");
  CHECK_THROWS_WITH(rms_norm(x, Variable(random_tensor({6}, 2)), {}, {.n_groups = 4}),
                    "rms_norm: 6 channels cannot be split into 4 groups of equal size");
  CHECK_THROWS_WITH(rms_norm(x, Variable(random_tensor({6}, 2).to(DType::f32))),
                    "rms_norm: weight is f32; beside f64 arguments it must be f64");
}
