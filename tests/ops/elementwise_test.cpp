#include "ops/elementwise/elementwise.h"

#include <cmath>
#include <string>

#include "autograd/tape.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

struct Operator {
  std::string name;
  int n_inputs;
  CheckedFunction function;
  double (*definition)(double, double);  // of one element; the second argument is unused with one input
};

double logistic(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

std::vector<Operator> all_operators() {
  using Inputs = const std::vector<Variable>&;
  using Outputs = std::vector<Variable>;
  return {
      {"add", 2, [](Inputs in) { return Outputs{add(in[0], in[1])}; },
       [](double a, double b) { return a + b; }},
      {"mul", 2, [](Inputs in) { return Outputs{mul(in[0], in[1])}; },
       [](double a, double b) { return a * b; }},
      {"scale", 1, [](Inputs in) { return Outputs{scale(in[0], -2.5)}; },
       [](double x, double) { return -2.5 * x; }},
      {"silu", 1, [](Inputs in) { return Outputs{silu(in[0])}; },
       [](double x, double) { return x * logistic(x); }},
      {"softplus", 1, [](Inputs in) { return Outputs{softplus(in[0])}; },
       [](double x, double) { return std::log(1.0 + std::exp(x)); }},
      {"negative_exp", 1, [](Inputs in) { return Outputs{negative_exp(in[0])}; },
       [](double x, double) { return -std::exp(x); }},
      {"gelu", 1, [](Inputs in) { return Outputs{gelu(in[0])}; },
       [](double x, double) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }},
      {"relu", 1, [](Inputs in) { return Outputs{relu(in[0])}; },
       [](double x, double) { return std::max(x, 0.0); }},
      {"elu_plus_one", 1, [](Inputs in) { return Outputs{elu_plus_one(in[0])}; },
       [](double x, double) { return x > 0 ? x + 1.0 : std::exp(x); }},
      {"silu_mul", 2, [](Inputs in) { return Outputs{silu_mul(in[0], in[1])}; },
       [](double gate, double up) { return gate * logistic(gate) * up; }},
      {"sigmoid_mul", 2, [](Inputs in) { return Outputs{sigmoid_mul(in[0], in[1])}; },
       [](double gate, double up) { return logistic(gate) * up; }},
      {"squared_relu", 1, [](Inputs in) { return Outputs{squared_relu(in[0])}; },
       [](double x, double) { return x > 0.0 ? x * x : 0.0; }},
  };
}

std::vector<Tensor> inputs_of(const Operator& op, const Shape& shape) {
  std::vector<Tensor> inputs;
  for (int i = 0; i < op.n_inputs; ++i) inputs.push_back(random_tensor(shape, 1 + i));
  return inputs;
}

/// Value and all gradients, for a cotangent of ones.
std::vector<Tensor> value_and_gradients(const Operator& op, const std::vector<Tensor>& inputs, DType dtype) {
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) leaves.push_back(Variable::leaf(input.to(dtype)));
  Tape tape;
  const Variable y = op.function(leaves)[0];
  tape.backward({y}, {Tensor::full(y.shape(), 1.0, dtype)});
  std::vector<Tensor> results{y.value()};
  for (const Variable& leaf : leaves) results.push_back(leaf.gradient().tensor());
  return results;
}

}  // namespace

TEST_CASE("elementwise: gradient matches finite differences at odd sizes") {
  for (const Operator& op : all_operators()) {
    for (const int64_t n : {1, 7, 100, 257}) {
      INFO(op.name << ", " << n << " elements");
      CHECK(check_gradient(op.function, inputs_of(op, {n})) == "");
      CHECK(check_gradient(op.function, inputs_of(op, {3, n})) == "");
    }
  }
}

TEST_CASE("elementwise: bf16 on a GPU agrees with f64") {
  for (const Operator& op : all_operators()) {
    // Around 4 and 8, the elements that move at once, and beyond one block.
    for (const int64_t n : {1, 3, 4, 5, 7, 8, 9, 2500}) {
      INFO(op.name << ", " << n << " elements");
      CHECK(check_cuda_bf16(op.function, inputs_of(op, {n}), {0, static_cast<size_t>(op.n_inputs - 1)}) ==
            "");
      CHECK(check_cuda(op.function, inputs_of(op, {n})) == "");
    }
  }
}

TEST_CASE("elementwise: tensors that begin anywhere, on a GPU") {
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  for (const Operator& op : all_operators()) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const int64_t first : {1, 2, 4}) {
        INFO(op.name << ", " << name_of(dtype) << " from element " << first << " on");
        std::vector<Variable> on_gpu, on_cpu;
        for (const Tensor& input : inputs_of(op, {100})) {
          const Tensor rounded = input.to(dtype);
          on_gpu.push_back(Variable::leaf(rounded.to(gpu).narrow(first, 93)));
          on_cpu.push_back(Variable::leaf(rounded.to(DType::f32).narrow(first, 93)));
        }
        const Tensor ones = Tensor::full({93 - first}, 1.0, DType::f32);
        Tape tape;
        const Variable y = op.function(on_gpu)[0], z = op.function(on_cpu)[0];
        tape.backward({y, z}, {ones.to(dtype).to(gpu), ones});
        // Rounding of the results to bf16.
        const double tolerance = dtype == DType::bf16 ? 4e-3 : 1e-6;
        CHECK(relative_error(y.value(), z.value()) < tolerance);
        for (size_t i = 0; i < on_gpu.size(); ++i) {
          CHECK(relative_error(on_gpu[i].gradient().tensor(), on_cpu[i].gradient().tensor()) < tolerance);
        }
      }
    }
  }
}

TEST_CASE("elementwise: add takes a bf16 b beside an f32 a on a GPU") {
  const auto function = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{add(in[0], in[1])};
  };
  for (const int64_t n : {1, 7, 8, 257}) {
    // a and y are not rounded, so only the gradient of b differs.
    CHECK(check_cuda_bf16(function, {random_tensor({n}, 1), random_tensor({n}, 2)}, {1}, 4e-3) == "");
  }
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  const Variable a = Variable::leaf(random_tensor({9}, 1).to(DType::f32).to(gpu));
  const Variable b = Variable::leaf(random_tensor({9}, 2).to(DType::bf16).to(gpu));
  Tape tape;
  const Variable y = add(a, b);
  CHECK(y.dtype() == DType::f32);
  tape.backward({y}, {random_tensor({9}, 3).to(DType::f32).to(gpu)});
  CHECK(a.gradient().tensor().dtype() == DType::f32);
  CHECK(b.gradient().tensor().dtype() == DType::bf16);
  CHECK_THROWS_WITH(add(b, a), "add: b is f32; it must be bf16 like the other arguments");
  CHECK_THROWS_WITH(mul(a, b), "mul: b is bf16; it must be f32 like the other arguments");
  CHECK_THROWS_WITH(silu(Variable(Tensor::zeros({3}, DType::f64, gpu))),
                    "silu: dtype f64 is not supported on a GPU; use f32 or bf16");
}

TEST_CASE("elementwise: cast rounds, and casts the gradient back") {
  const Variable x = Variable::leaf(Tensor::from_vector<double>({3}, {1.0 + 0x1p-30, -2.0, 3.0}));
  CHECK(cast(x, DType::f64).value().raw_data() == x.value().raw_data());
  Tape tape;
  const Variable y = cast(x, DType::f32);
  CHECK(y.value().to_vector<float>() == std::vector<float>{1, -2, 3});
  tape.backward({y}, {Tensor::from_vector<float>({3}, {4, 5, 6})});
  CHECK(x.gradient().tensor().dtype() == DType::f64);
  CHECK(x.gradient().tensor().to_vector<double>() == std::vector<double>{4, 5, 6});
  CHECK_THROWS_WITH(cast(x, DType::i32), "cast: from f64 to i32; both must be f32, f64 or bf16");

  const auto narrower = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{cast(in[0], in[0].device().is_cpu() ? DType::f64 : DType::bf16)};
  };
  const auto wider = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{cast(in[0], in[0].device().is_cpu() ? DType::f64 : DType::f32)};
  };
  for (const int64_t n : {1, 7, 8, 257}) {
    CHECK(check_cuda_bf16(narrower, {random_tensor({n}, 1)}, {}, 4e-3) == "");
    CHECK(check_cuda_bf16(wider, {random_tensor({n}, 1)}, {0}, 4e-3) == "");
  }
}

TEST_CASE("elementwise: every entry of the Jacobian") {
  for (const Operator& op : all_operators()) {
    INFO(op.name);
    CHECK(check_jacobian(op.function, inputs_of(op, {2, 3})) == "");
  }
}

TEST_CASE("elementwise: equals the definition") {
  for (const Operator& op : all_operators()) {
    INFO(op.name);
    const std::vector<Tensor> inputs = inputs_of(op, {100});
    const Tensor expected = empty_like(inputs[0]);
    for (int64_t i = 0; i < 100; ++i) {
      expected.data<double>()[i] =
          op.definition(inputs[0].data<double>()[i], op.n_inputs > 1 ? inputs[1].data<double>()[i] : 0.0);
    }
    CHECK(relative_error(value_and_gradients(op, inputs, DType::f64)[0], expected) < 1e-15);
  }
}

TEST_CASE("elementwise: f32 agrees with f64") {
  for (const Operator& op : all_operators()) {
    const std::vector<Tensor> inputs = inputs_of(op, {1000});
    const std::vector<Tensor> f32 = value_and_gradients(op, inputs, DType::f32);
    const std::vector<Tensor> f64 = value_and_gradients(op, inputs, DType::f64);
    for (size_t i = 0; i < f32.size(); ++i) {
      INFO(op.name << ", result " << i);
      // The rounding of the inputs and of at most ten operations, each 2^-24, relative to the largest result.
      CHECK(relative_error(f32[i], f64[i]) < 10 * 6e-8);
    }
  }
}

TEST_CASE("elementwise: the bits do not depend on the number of threads") {
  for (const Operator& op : all_operators()) {
    const std::vector<Tensor> inputs = inputs_of(op, {3, 33331});
    std::vector<Tensor> one, three;
    {
      const WithThreads threads(1);
      one = value_and_gradients(op, inputs, DType::f32);
    }
    {
      const WithThreads threads(3);
      three = value_and_gradients(op, inputs, DType::f32);
    }
    for (size_t i = 0; i < one.size(); ++i) {
      INFO(op.name << ", result " << i);
      CHECK(one[i].to_vector<float>() == three[i].to_vector<float>());
    }
  }
}

TEST_CASE("elementwise: silu and softplus keep their limits at large arguments") {
  const Variable x = Variable::leaf(Tensor::from_vector<float>({4}, {-1000.0f, -100.0f, 100.0f, 1000.0f}));
  Tape tape;
  const Variable y = silu(x);
  const Variable z = softplus(x);
  const Tensor ones = Tensor::full({4}, 1.0, DType::f32);
  tape.backward({y, z}, {ones, ones});
  CHECK(y.value().to_vector<float>() == std::vector<float>{0, 0, 100, 1000});
  CHECK(z.value().to_vector<float>() == std::vector<float>{0, 0, 100, 1000});
  CHECK(x.gradient().tensor().to_vector<float>() == std::vector<float>{0, 0, 2, 2});
}

TEST_CASE("elementwise: gelu, relu and elu_plus_one keep their limits at large arguments") {
  const Variable x = Variable::leaf(Tensor::from_vector<float>({4}, {-1000.0f, 0.0f, 100.0f, 1000.0f}));
  Tape tape;
  const Variable a = gelu(x), b = relu(x), c = elu_plus_one(x);
  CHECK(a.value().to_vector<float>() == std::vector<float>{0, 0, 100, 1000});
  CHECK(b.value().to_vector<float>() == std::vector<float>{0, 0, 100, 1000});
  CHECK(c.value().to_vector<float>() == std::vector<float>{0, 1, 101, 1001});
  const Tensor ones = Tensor::full({4}, 1.0, DType::f32);
  tape.backward({a, b, c}, {ones, ones, ones});
  CHECK(x.gradient().tensor().to_vector<float>() == std::vector<float>{0, 1.5, 3, 3});
}

TEST_CASE("elementwise: an argument that is given twice gets both gradients") {
  const auto square = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{mul(in[0], in[0])};
  };
  const auto twice = [](const std::vector<Variable>& in) {
    const Variable sum = add(in[0], in[0]);
    return std::vector<Variable>{add(sum, in[0]), sum};
  };
  CHECK(check_gradient(square, {random_tensor({7}, 1)}) == "");
  CHECK(check_gradient(twice, {random_tensor({7}, 1)}) == "");
}

TEST_CASE("elementwise: add leaves the gradients of its arguments apart") {
  // a gets a second contribution after both were handed the same tensor.
  const Variable a = Variable::leaf(random_tensor({5}, 1));
  const Variable b = Variable::leaf(random_tensor({5}, 2));
  Tape tape;
  const Variable more = scale(a, 3.0);
  const Variable y = add(a, b);
  const Tensor ones = Tensor::full({5}, 1.0, DType::f64);
  tape.backward({more, y}, {ones, ones});
  CHECK(a.gradient().tensor().to_vector<double>() == std::vector<double>(5, 4.0));
  CHECK(b.gradient().tensor().to_vector<double>() == std::vector<double>(5, 1.0));
}

TEST_CASE("elementwise: scalars and empty tensors") {
  for (const Operator& op : all_operators()) {
    INFO(op.name);
    CHECK(check_gradient(op.function, inputs_of(op, {})) == "");
    CHECK(value_and_gradients(op, inputs_of(op, {0, 3}), DType::f32)[0].shape() == Shape{0, 3});
  }
}

TEST_CASE("elementwise: names what is wrong") {
  const Variable a(random_tensor({2, 6}, 1));
  const Variable short_b(random_tensor({6}, 2));
  const Variable f32_b(random_tensor({2, 6}, 2).to(DType::f32));
  CHECK_THROWS_WITH(add(a, short_b), "add: b has shape (6); it must be the shape of a = (2, 6)");
  CHECK_THROWS_WITH(mul(a, short_b), "mul: b has shape (6); it must be the shape of a = (2, 6)");
  CHECK_THROWS_WITH(silu_mul(a, short_b),
                    "silu_mul: up has shape (6); it must be the shape of gate = (2, 6)");
  CHECK_THROWS_WITH(add(a, f32_b), "add: b is f32; it must be f64 like the other arguments");
  CHECK_THROWS_WITH(silu_mul(a, f32_b), "silu_mul: up is f32; it must be f64 like the other arguments");
  const Variable integers(Tensor::zeros({3}, DType::i32));
  CHECK_THROWS_WITH(silu(integers), "silu: dtype i32 is not supported on the CPU; use f32 or f64");
  CHECK_THROWS_WITH(scale(integers, 2.0), "scale: dtype i32 is not supported on the CPU; use f32 or f64");
}
