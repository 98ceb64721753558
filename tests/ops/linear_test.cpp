#include "ops/linear/linear.h"

#include "autograd/tape.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

std::vector<Variable> with_bias(const std::vector<Variable>& in) {
  return {linear(in[0], in[1], in[2])};
}

}  // namespace

TEST_CASE("linear: gradient matches finite differences at odd sizes") {
  for (const int64_t rows : {1, 7, 100, 257}) {
    const std::vector<Tensor> inputs{random_tensor({rows, 9}, 1), random_tensor({5, 9}, 2),
                                     random_tensor({5}, 3)};
    CHECK(check_gradient(with_bias, inputs) == "");
  }
  CHECK(check_jacobian(with_bias,
                       {random_tensor({2, 3}, 1), random_tensor({4, 3}, 2), random_tensor({4}, 3)}) == "");
}

TEST_CASE("linear: f32 and bf16 on a GPU agree with f64") {
  // Columns of the bias are summed by 128 threads, four of them a thread's where they can be packed; rows by up to 256
  // blocks.
  for (const int64_t d_out : {4, 127, 128, 129, 508, 512, 516}) {
    for (const int64_t rows : {1, 3, 256, 257, 513}) {
      INFO("rows " << rows << ", d_out " << d_out);
      const std::vector<Tensor> inputs{random_tensor({rows, 12}, 1), random_tensor({d_out, 12}, 2),
                                       random_tensor({d_out}, 3)};
      CHECK(check_cuda(with_bias, inputs) == "");
      CHECK(check_cuda_bf16(with_bias, inputs, {0, 1}) == "");
    }
  }
}

TEST_CASE("linear: on a GPU, layers that share x and weight add their gradients") {
  const CheckedFunction twice = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{linear(in[0], in[1], in[2]), linear(in[0], in[1], in[2])};
  };
  const std::vector<Tensor> inputs{random_tensor({7, 9}, 1), random_tensor({5, 9}, 2), random_tensor({5}, 3)};
  CHECK(check_cuda(twice, inputs) == "");
  CHECK(check_cuda_bf16(twice, inputs, {0, 1}) == "");
}

TEST_CASE("linear: f32 agrees with f64 through every path of the product") {
  for (const int64_t rows : {1, 2, 4, 5, 64}) {
    for (const int64_t d_in : {1, 63, 64, 257}) {
      const Tensor x = random_tensor({rows, d_in}, 1), weight = random_tensor({33, d_in}, 2);
      const Tensor exact = linear(Variable(x), Variable(weight)).value();
      const Tensor single = linear(Variable(x.to(DType::f32)), Variable(weight.to(DType::f32))).value();
      CHECK(relative_error(single, exact) < 20 * 6e-8);
    }
  }
}

TEST_CASE("linear: rows of one parameter used apart gather one gradient") {
  const Tensor x = random_tensor({6, 3}, 1), weight = random_tensor({5, 3}, 2),
               cotangent = random_tensor({6, 5}, 3);
  const Variable whole = Variable::parameter(weight, zeros_like(weight));
  const Variable parts = Variable::parameter(weight, zeros_like(weight));
  const Variable x_whole = Variable::leaf(x), x_parts = Variable::leaf(x);
  {
    Tape tape;
    tape.backward({linear(x_whole, whole)}, {cotangent});
  }
  {
    Tape tape;
    const Tensor left = Tensor::empty({6, 2}, DType::f64), right = Tensor::empty({6, 3}, DType::f64);
    for (int64_t i = 0; i < 6; ++i) {
      for (int64_t j = 0; j < 5; ++j) {
        (j < 2 ? left : right).data<double>()[j < 2 ? i * 2 + j : i * 3 + j - 2] =
            cotangent.data<double>()[i * 5 + j];
      }
    }
    tape.backward({linear(x_parts, parts.parameter_rows(0, 2)), linear(x_parts, parts.parameter_rows(2, 5))},
                  {left, right});
  }
  CHECK(relative_error(parts.gradient().tensor(), whole.gradient().tensor()) < 1e-15);
  CHECK(relative_error(x_parts.gradient().tensor(), x_whole.gradient().tensor()) < 1e-15);
}

TEST_CASE("linear: names what is wrong") {
  const Variable x(random_tensor({2, 5, 3}, 1));
  CHECK_THROWS_WITH(linear(x, Variable(random_tensor({4, 2}, 2))),
                    "linear: x has shape (2, 5, 3); its last axis must be d_in = 2, from weight (4, 2)");
  CHECK_THROWS_WITH(linear(x, Variable(random_tensor({4, 3}, 2)), Variable(random_tensor({3}, 2))),
                    "linear: bias has shape (3); it must be (d_out) = (4)");
  CHECK_THROWS_WITH(linear(x, Variable(random_tensor({4, 3}, 2).to(DType::f32))),
                    "linear: weight is f32; it must be f64 like the other arguments");
  CHECK_THROWS_WITH(
      linear(x, Variable(random_tensor({4, 3}, 2)), Variable(random_tensor({4}, 2).to(DType::f32))),
      "linear: bias is f32; beside f64 arguments it must be f64");
}
