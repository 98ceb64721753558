#include "ops/layer_norm/layer_norm.h"

#include <cmath>

#include "autograd/tape.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

CheckedFunction with_epsilon(double epsilon) {
  return [epsilon](const std::vector<Variable>& inputs) {
    return std::vector<Variable>{layer_norm(inputs[0], inputs[1], inputs[2], epsilon)};
  };
}

std::vector<Tensor> inputs_of(int64_t rows, int64_t d) {
  return {random_tensor({rows, d}, 1), random_tensor({d}, 2), random_tensor({d}, 3)};
}

/// y and all gradients, for a random gradient of y.
std::vector<Tensor> value_and_gradients(const std::vector<Tensor>& inputs, DType dtype) {
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) leaves.push_back(Variable::leaf(input.to(dtype)));
  Tape tape;
  const Variable y = layer_norm(leaves[0], leaves[1], leaves[2]);
  tape.backward({y}, {random_tensor(y.shape(), 4).to(dtype)});
  std::vector<Tensor> results{y.value()};
  for (const Variable& leaf : leaves) results.push_back(leaf.gradient().tensor());
  return results;
}

}  // namespace

TEST_CASE("layer_norm: gradient matches finite differences at odd sizes") {
  // A wide epsilon makes y smooth on the scale of the differences' step where a row's variance happens to be
  // small.
  for (const int64_t rows : {1, 7, 100, 257}) {
    for (const int64_t d : {1, 7, 33, 257}) {
      INFO("rows " << rows << ", d " << d);
      // With one channel y is the bias and the gradient of x exactly 0, so that no rounding is small beside it.
      const double cuda_tolerance = d == 1 ? 1e30 : 1e-5;
      CHECK(check_gradient(with_epsilon(0.1), inputs_of(rows, d), 1e-6, cuda_tolerance) == "");
    }
  }
}

TEST_CASE("layer_norm: f32 and bf16 on a GPU agree with f64") {
  // A warp takes 128 channels at a time where they can be packed, else 32; 8 rows are a block's at once.
  for (const int64_t d : {4, 31, 32, 124, 128, 132, 260}) {
    for (const int64_t rows : {1, 9, 300}) {
      INFO("rows " << rows << ", d " << d);
      CHECK(check_cuda(with_epsilon(1e-2), inputs_of(rows, d)) == "");
      CHECK(check_cuda_bf16(with_epsilon(1e-2), inputs_of(rows, d), {0}) == "");
    }
  }
  // More channels than 8 warps find shared memory for.
  for (const int64_t d : {1540, 13001}) CHECK(check_cuda(with_epsilon(1e-2), inputs_of(3, d)) == "");
}

TEST_CASE("layer_norm: every entry of the Jacobian") {
  CHECK(check_jacobian(with_epsilon(1e-2), inputs_of(2, 6)) == "");
}

TEST_CASE("layer_norm: equals the definition") {
  const int64_t rows = 5, d = 33;
  const std::vector<Tensor> inputs = inputs_of(rows, d);
  const Tensor expected = empty_like(inputs[0]);
  for (int64_t row = 0; row < rows; ++row) {
    const double* x = inputs[0].data<double>() + row * d;
    double mean = 0.0, variance = 0.0;
    for (int64_t j = 0; j < d; ++j) mean += x[j] / d;
    for (int64_t j = 0; j < d; ++j) variance += (x[j] - mean) * (x[j] - mean) / d;
    for (int64_t j = 0; j < d; ++j) {
      expected.data<double>()[row * d + j] =
          (x[j] - mean) / std::sqrt(variance + 1e-5) * inputs[1].data<double>()[j] +
          inputs[2].data<double>()[j];
    }
  }
  CHECK(relative_error(value_and_gradients(inputs, DType::f64)[0], expected) < 1e-14);
}

TEST_CASE("layer_norm: a large mean does not drown the variance") {
  const int64_t d = 256;
  const Tensor x = Tensor::empty({1, d}, DType::f32);
  for (int64_t j = 0; j < d; ++j) x.data<float>()[j] = 10000.0f + (j % 2 == 0 ? 1.0f : -1.0f);
  // The mean of squares, 1e8 + 1, would round to 1e8 and the variance to 0.
  const auto check_on = [&](Device device) {
    const Variable y =
        layer_norm(Variable(x.to(device)), Variable(Tensor::full({d}, 1.0, DType::f32, device)),
                   Variable(Tensor::zeros({d}, DType::f32, device)));
    const std::vector<double> values = y.value().to_vector<double>();
    for (int64_t j = 0; j < d; ++j) CHECK(std::abs(values[j] - (j % 2 == 0 ? 1 : -1)) < 1e-4);
  };
  check_on({});
  if (has_cuda()) check_on(parse_device("cuda"));
}

TEST_CASE("layer_norm: adds to parameters' gradients, and skips those that are not wanted") {
  const std::vector<Tensor> inputs = inputs_of(20, 7);
  const Variable weight = Variable::parameter(inputs[1], Tensor::full({7}, 10.0, DType::f64));
  const Variable bias = Variable::parameter(inputs[2], Tensor::full({7}, 20.0, DType::f64));
  Tape tape;
  const Variable y = layer_norm(Variable(inputs[0]), weight, bias);
  const Variable z = layer_norm(Variable(inputs[0]), Variable(inputs[1]), bias);
  const Tensor grad_y = random_tensor({20, 7}, 4);
  tape.backward({y, z}, {grad_y, grad_y});
  const std::vector<Tensor> plain = value_and_gradients(inputs, DType::f64);
  for (int64_t j = 0; j < 7; ++j) {
    CHECK(std::abs(weight.gradient().tensor().data<double>()[j] - 10.0 - plain[2].data<double>()[j]) < 1e-12);
    CHECK(std::abs(bias.gradient().tensor().data<double>()[j] - 20.0 - 2 * plain[3].data<double>()[j]) <
          1e-12);
  }
}

TEST_CASE("layer_norm: the bits do not depend on the number of threads") {
  const std::vector<Tensor> inputs = inputs_of(1001, 100);
  const auto run = [&](int n_threads) {
    const WithThreads threads(n_threads);
    return value_and_gradients(inputs, DType::f32);
  };
  const std::vector<Tensor> one = run(1);
  const std::vector<Tensor> three = run(3);
  for (size_t i = 0; i < one.size(); ++i) CHECK(one[i].to_vector<float>() == three[i].to_vector<float>());
}

TEST_CASE("layer_norm: a row alone equals that row of the whole") {
  const std::vector<Tensor> inputs = inputs_of(20, 33);
  const Variable weight(inputs[1]), bias(inputs[2]);
  const Tensor whole = layer_norm(Variable(inputs[0]), weight, bias).value();
  const Tensor row = layer_norm(Variable(inputs[0].narrow(13, 14)), weight, bias).value();
  CHECK(row.to_vector<double>() == whole.narrow(13, 14).to_vector<double>());
}

TEST_CASE("layer_norm: f32 agrees with f64") {
  const std::vector<Tensor> inputs = inputs_of(100, 257);
  const std::vector<Tensor> f32 = value_and_gradients(inputs, DType::f32);
  const std::vector<Tensor> f64 = value_and_gradients(inputs, DType::f64);
  for (size_t i = 0; i < f32.size(); ++i) {
    INFO("result " << i);
    // Rounding of the inputs and of sums over 257 channels or 100 rows: a few units of 2^-24.
    CHECK(relative_error(f32[i], f64[i]) < 20 * 6e-8);
  }
}

TEST_CASE("layer_norm: empty tensors") {
  const Variable y =
      layer_norm(Variable(Tensor::zeros({0, 7}, DType::f32)), Variable(Tensor::zeros({7}, DType::f32)),
                 Variable(Tensor::zeros({7}, DType::f32)));
  CHECK(y.shape() == Shape{0, 7});
}

TEST_CASE("layer_norm: names what is wrong") {
  const Variable x(random_tensor({2, 6}, 1));
  const Variable d6(random_tensor({6}, 2));
  const Variable d5(random_tensor({5}, 2));
  const Variable f32(random_tensor({6}, 2).to(DType::f32));
  CHECK_THROWS_WITH(layer_norm(Variable(random_tensor({}, 1)), d6, d6),
                    "layer_norm: x is a scalar; it must be (..., d)");
  CHECK_THROWS_WITH(layer_norm(x, d5, d6), "layer_norm: weight has shape (5); it must be (d) = (6)");
  CHECK_THROWS_WITH(layer_norm(x, d6, d5), "layer_norm: bias has shape (5); it must be (d) = (6)");
  CHECK_THROWS_WITH(layer_norm(x, f32, d6), "layer_norm: weight is f32; beside f64 arguments it must be f64");
  CHECK_THROWS_WITH(layer_norm(x, d6, f32), "layer_norm: bias is f32; beside f64 arguments it must be f64");
  CHECK_THROWS_WITH(layer_norm(x, d6, d6, -1.0), "layer_norm: epsilon is -1; it must be >= 0");
}
