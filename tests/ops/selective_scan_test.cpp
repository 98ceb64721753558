#include "ops/selective_scan/selective_scan.h"

#include <cmath>

#include "autograd/tape.h"
#include "ops/elementwise/elementwise.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

struct Sizes {
  int64_t batch, length, d_inner, d_state, n_groups = 1;
};

enum Input { x, dt, A, B, C, D, z, dt_bias, initial_state };

/// All inputs, in the order of Input. A is kept negative: an unstable recurrence would measure nothing but its growth.
std::vector<Tensor> inputs_of(const Sizes& sizes) {
  const Shape row{sizes.batch, sizes.length, sizes.d_inner};
  const Shape map{sizes.batch, sizes.length, sizes.n_groups, sizes.d_state};
  const Tensor A = random_tensor({sizes.d_inner, sizes.d_state}, 3);
  for (int64_t i = 0; i < A.numel(); ++i) A.data<double>()[i] = -0.1 - std::abs(A.data<double>()[i]);
  return {random_tensor(row, 1),
          random_tensor(row, 2),
          A,
          random_tensor(map, 4),
          random_tensor(map, 5),
          random_tensor({sizes.d_inner}, 6),
          random_tensor(row, 7),
          random_tensor({sizes.d_inner}, 8, 0.5),
          random_tensor({sizes.batch, sizes.d_inner, sizes.d_state}, 9)};
}

SelectiveScanOutput scan(const std::vector<Variable>& in, const Tensor& resets = {}) {
  return selective_scan({.x = in[x],
                         .dt = in[dt],
                         .A = in[A],
                         .B = in[B],
                         .C = in[C],
                         .D = in[D],
                         .z = in[z],
                         .dt_bias = in[dt_bias],
                         .initial_state = in[initial_state],
                         .resets = resets});
}

CheckedFunction with_resets(const Tensor& resets) {
  return [=](const std::vector<Variable>& in) {
    const SelectiveScanOutput out = scan(in, resets.to(in[0].device()));
    return std::vector<Variable>{out.y, out.final_state};
  };
}

/// Without anything optional, and without softplus. The step sizes are made positive before.
std::vector<Variable> scan_bare(const std::vector<Variable>& in) {
  const SelectiveScanOutput out = selective_scan(
      {.x = in[x], .dt = softplus(in[dt]), .A = in[A], .B = in[B], .C = in[C]}, {.softplus = false});
  return {out.y, out.final_state};
}

std::vector<Tensor> bare_inputs_of(const Sizes& sizes) {
  std::vector<Tensor> inputs = inputs_of(sizes);
  inputs.resize(D);
  return inputs;
}

std::vector<Variable> variables(const std::vector<Tensor>& tensors, DType dtype = DType::f64) {
  std::vector<Variable> result;
  for (const Tensor& tensor : tensors) result.emplace_back(tensor.to(dtype));
  return result;
}

/// y and the final state as the header's equations say, in f64, one number after the other.
std::vector<Tensor> definition(const std::vector<Tensor>& in, const Tensor& resets) {
  const int64_t batch = in[x].dim(0), length = in[x].dim(1), d_inner = in[x].dim(2);
  const int64_t n_groups = in[B].dim(2), d_state = in[B].dim(3);
  const Tensor y = empty_like(in[x]), h = in[initial_state].clone();
  const auto at = [](const Tensor& tensor, int64_t index) { return tensor.data<double>()[index]; };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t d = 0; d < d_inner; ++d) {
        const int64_t i = (b * length + t) * d_inner + d;
        const double step = std::log1p(std::exp(at(in[dt], i) + at(in[dt_bias], d)));
        double sum = at(in[D], d) * at(in[x], i);
        for (int64_t n = 0; n < d_state; ++n) {
          const int64_t map = ((b * length + t) * n_groups + d / (d_inner / n_groups)) * d_state + n;
          double& state = h.data<double>()[(b * d_inner + d) * d_state + n];
          if (resets.defined() && resets.data<int32_t>()[b * length + t] != 0) state = 0.0;
          state = std::exp(step * at(in[A], d * d_state + n)) * state + step * at(in[B], map) * at(in[x], i);
          sum += at(in[C], map) * state;
        }
        y.data<double>()[i] = sum * at(in[z], i) / (1.0 + std::exp(-at(in[z], i)));
      }
    }
  }
  return {y, h};
}

}  // namespace

TEST_CASE("selective_scan: the definition") {
  for (const Sizes sizes : {Sizes{2, 9, 6, 3, 2}, Sizes{1, 70, 35, 5, 1}}) {
    const std::vector<Tensor> in = inputs_of(sizes);
    for (const Tensor& resets : {Tensor(), random_resets(sizes.batch, sizes.length, 0.2)}) {
      const std::vector<Tensor> expected = definition(in, resets);
      const SelectiveScanOutput out = scan(variables(in), resets);
      CHECK(relative_error(out.y.value(), expected[0]) < 1e-13);
      CHECK(relative_error(out.final_state.value(), expected[1]) < 1e-13);
    }
  }
}

TEST_CASE("selective_scan: gradient matches finite differences at odd sizes") {
  for (const Sizes sizes : {Sizes{1, 1, 1, 1}, Sizes{2, 7, 3, 5}, Sizes{1, 40, 33, 3}, Sizes{3, 19, 6, 4, 3},
                            Sizes{1, 21, 4, 2, 4}, Sizes{2, 33, 66, 2, 2}}) {
    INFO("length " << sizes.length << ", d_inner " << sizes.d_inner << ", groups " << sizes.n_groups);
    const std::vector<Tensor> inputs = inputs_of(sizes);
    CHECK(check_gradient(with_resets({}), inputs) == "");
    CHECK(check_gradient(with_resets(random_resets(sizes.batch, sizes.length, 0.2)), inputs) == "");
    CHECK(check_gradient(scan_bare, bare_inputs_of(sizes)) == "");
  }
}

TEST_CASE("selective_scan: gradient matches at lengths around the stretches of 8 and 64 steps") {
  for (const int64_t length : {2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200}) {
    INFO("length " << length);
    const std::vector<Tensor> inputs = inputs_of({2, length, 3, 4});
    CHECK(check_gradient(with_resets({}), inputs) == "");
    CHECK(check_gradient(with_resets(random_resets(2, length, 0.05)), inputs) == "");
  }
}

TEST_CASE("selective_scan: bf16 activations on a GPU agree with f64") {
  for (const Sizes sizes : {Sizes{2, 21, 6, 5, 2}, Sizes{1, 50, 40, 4}, Sizes{2, 16, 3, 16}}) {
    INFO("length " << sizes.length << ", d_inner " << sizes.d_inner);
    const std::vector<Tensor> inputs = inputs_of(sizes);
    const Tensor resets = random_resets(sizes.batch, sizes.length, 0.1);
    CHECK(check_cuda_bf16(with_resets({}), inputs, {x, dt, B, C, z}) == "");
    CHECK(check_cuda_bf16(with_resets(resets), inputs, {x, dt, B, C, z}) == "");
  }
}

TEST_CASE("selective_scan: on a GPU, chunks of several stretches") {
  // 129 stretches are cut into 43 chunks of three.
  const std::vector<Tensor> inputs = inputs_of({1, 1027, 2, 1});
  CHECK(check_cuda(with_resets({}), inputs) == "");
  CHECK(check_cuda(with_resets(random_resets(1, 1027, 0.005)), inputs) == "");
}

TEST_CASE("selective_scan: every entry of the Jacobian") {
  const Tensor resets = Tensor::from_vector<int32_t>({1, 4}, {0, 0, 1, 0});
  CHECK(check_jacobian(with_resets({}), inputs_of({1, 3, 2, 2})) == "");
  CHECK(check_jacobian(with_resets(resets), inputs_of({1, 4, 2, 2, 2})) == "");
  CHECK(check_jacobian(scan_bare, bare_inputs_of({2, 2, 2, 1})) == "");
}

TEST_CASE("selective_scan: gradients from one output alone") {
  const std::vector<Tensor> inputs = inputs_of({2, 21, 5, 3});
  const auto output = [](int which) {
    return [which](const std::vector<Variable>& in) {
      const SelectiveScanOutput out = scan(in);
      return std::vector<Variable>{which == 0 ? out.y : out.final_state};
    };
  };
  CHECK(check_gradient(output(0), inputs) == "");
  CHECK(check_gradient(output(1), inputs) == "");
}

TEST_CASE("selective_scan: a sequence in two pieces equals the whole, gradients too") {
  const Sizes sizes{2, 150, 5, 3};
  const std::vector<Tensor> in = inputs_of(sizes);
  const Tensor resets = random_resets(2, sizes.length, 0.03);
  const Tensor cotangent = random_tensor({2, sizes.length, 5}, 20), last = random_tensor({2, 5, 3}, 21);
  // The gradients of A, D, dt_bias and the initial state, and y, with a border before each of these steps.
  const auto run = [&](const std::vector<int64_t>& borders) {
    Tape tape;
    std::vector<Variable> leaves, outputs;
    for (const Tensor& tensor : in) leaves.push_back(Variable::leaf(tensor));
    std::vector<Tensor> cotangents, result;
    Variable state = leaves[initial_state];
    for (size_t i = 0; i + 1 < borders.size(); ++i) {
      std::vector<Variable> piece = leaves;
      for (const Input sequence : {x, dt, B, C, z})
        piece[sequence] = Variable(steps_of(in[sequence], borders[i], borders[i + 1]));
      piece[initial_state] = state;
      const SelectiveScanOutput out = scan(piece, steps_of(resets, borders[i], borders[i + 1]));
      state = out.final_state;
      outputs.push_back(out.y);
      cotangents.push_back(steps_of(cotangent, borders[i], borders[i + 1]));
    }
    outputs.push_back(state);
    cotangents.push_back(last);
    tape.backward(outputs, cotangents);
    for (const Input parameter : {A, D, dt_bias, initial_state})
      result.push_back(leaves[parameter].gradient().tensor());
    result.push_back(steps_of(outputs[outputs.size() - 2].value(), 0, 1));
    result.push_back(state.value());
    return result;
  };
  for (const int64_t cut : {1, 63, 64, 65, 100, 149}) {
    INFO("cut at " << cut);
    const std::vector<Tensor> whole = run({0, sizes.length}), cut_up = run({0, cut, sizes.length});
    for (const size_t i : {0, 1, 2, 3, 5}) CHECK(relative_error(cut_up[i], whole[i]) < 1e-13);
  }
}

TEST_CASE("selective_scan: a packed row equals its documents one by one") {
  const Sizes sizes{1, 80, 4, 3};
  const std::vector<Tensor> in = inputs_of(sizes);
  const std::vector<int64_t> borders{0, 5, 6, 70, 80};
  const Tensor resets = Tensor::zeros({1, 80}, DType::i32);
  for (const int64_t border : {5, 6, 70}) resets.data<int32_t>()[border] = 1;
  std::vector<Variable> whole = variables(in);
  whole[initial_state] = Variable();
  const SelectiveScanOutput packed = scan(whole, resets);
  for (size_t i = 0; i + 1 < borders.size(); ++i) {
    std::vector<Variable> document = whole;
    for (const Input sequence : {x, dt, B, C, z})
      document[sequence] = Variable(steps_of(in[sequence], borders[i], borders[i + 1]));
    const SelectiveScanOutput alone = scan(document);
    CHECK(relative_error(steps_of(packed.y.value(), borders[i], borders[i + 1]), alone.y.value()) == 0.0);
    if (i + 2 == borders.size())
      CHECK(relative_error(packed.final_state.value(), alone.final_state.value()) == 0.0);
  }
}

TEST_CASE("selective_scan: f32 agrees with f64") {
  const std::vector<Tensor> in = inputs_of({2, 130, 37, 16});
  const Tensor exact = scan(variables(in)).y.value();
  // Rounding of the inputs, 2 units of the exponential, sums of 16: some tens of units of 2^-24.
  CHECK(relative_error(scan(variables(in, DType::f32)).y.value(), exact) < 50 * 6e-8);
}

TEST_CASE("selective_scan: large step sizes and rates overflow nowhere") {
  const Tensor one = Tensor::full({1, 3, 1}, 1.0, DType::f32);
  const Tensor map = Tensor::full({1, 3, 1, 1}, 1.0, DType::f32);
  const Tensor steps = Tensor::from_vector<float>({1, 3, 1}, {200.0f, -200.0f, 90.0f});
  std::vector<Tensor> gradients;
  Tape tape;
  const Variable dt_leaf = Variable::leaf(steps);
  const SelectiveScanOutput out = selective_scan({.x = Variable(one),
                                                  .dt = dt_leaf,
                                                  .A = Variable(Tensor::full({1, 1}, -1e4, DType::f32)),
                                                  .B = Variable(map),
                                                  .C = Variable(map)});
  CHECK(out.y.value().to_vector<float>() == std::vector<float>{200.0f, 200.0f, 90.0f});
  tape.backward({out.y}, {one});
  CHECK(dt_leaf.gradient().tensor().to_vector<float>() == std::vector<float>{2.0f, 0.0f, 1.0f});
}

TEST_CASE("selective_scan: the same bits with 1 and 4 threads") {
  const std::vector<Tensor> in = inputs_of({3, 70, 100, 4, 2});
  const auto run = [&](int n_threads) {
    const WithThreads threads(n_threads);
    Tape tape;
    std::vector<Variable> leaves;
    for (const Tensor& tensor : in) leaves.push_back(Variable::leaf(tensor.to(DType::f32)));
    const SelectiveScanOutput out = scan(leaves, random_resets(3, 70, 0.1));
    tape.backward({out.y, out.final_state}, {out.y.value().clone(), out.final_state.value().clone()});
    std::vector<std::vector<float>> bits{out.y.value().to_vector<float>()};
    for (const Variable& leaf : leaves) bits.push_back(leaf.gradient().tensor().to_vector<float>());
    return bits;
  };
  CHECK(run(1) == run(4));
}

TEST_CASE("selective_scan: names what is wrong") {
  const std::vector<Tensor> in = inputs_of({2, 5, 6, 3, 2});
  const auto error = [&](Input which, const Tensor& wrong, const Tensor& resets = {}) {
    std::vector<Variable> arguments = variables(in);
    arguments[which] = Variable(wrong);
    return input_error_of([&] { scan(arguments, resets); });
  };
  CHECK(error(x, random_tensor({2, 5}, 1)) ==
        "selective_scan: x has shape (2, 5); it must be (batch, length, d_inner)");
  CHECK(error(x, random_tensor({2, 0, 6}, 1)) ==
        "selective_scan: length is 0; a sequence has at least one step");
  CHECK(error(dt, random_tensor({2, 5, 1}, 1)) ==
        "selective_scan: dt has shape (2, 5, 1); it must be (batch, length, d_inner) = (2, 5, 6)");
  CHECK(error(A, random_tensor({3, 6}, 1)) ==
        "selective_scan: A has shape (3, 6); it must be (d_inner, d_state) with d_inner = 6");
  CHECK(error(A, in[A].to(DType::f32)) == "selective_scan: A is f32; beside f64 arguments it must be f64");
  CHECK(error(B, random_tensor({2, 5, 2, 4}, 1)) ==
        "selective_scan: B has shape (2, 5, 2, 4); it must be (batch, length, n_groups, d_state) = (2, 5, "
        "n_groups, 3), d_state from A");
  CHECK(
      error(B, random_tensor({2, 5, 4, 3}, 1)) ==
      "selective_scan: 6 channels cannot share 4 groups of B and C; d_inner must be a multiple of n_groups");
  CHECK(error(C, random_tensor({2, 5, 1, 3}, 1)) ==
        "selective_scan: C has shape (2, 5, 1, 3); it must be the shape of B = (2, 5, 2, 3)");
  CHECK(error(D, random_tensor({3}, 1)) == "selective_scan: D has shape (3); it must be (d_inner) = (6)");
  CHECK(error(z, random_tensor({2, 4, 6}, 1)) ==
        "selective_scan: z has shape (2, 4, 6); it must be (batch, length, d_inner) = (2, 5, 6)");
  CHECK(error(dt_bias, random_tensor({2}, 1)) ==
        "selective_scan: dt_bias has shape (2); it must be (d_inner) = (6)");
  CHECK(
      error(initial_state, random_tensor({2, 3, 6}, 1)) ==
      "selective_scan: initial_state has shape (2, 3, 6); it must be (batch, d_inner, d_state) = (2, 6, 3)");
  const Tensor resets = Tensor::zeros({2, 5}, DType::i32);
  resets.data<int32_t>()[7] = 2;
  CHECK(error(x, in[x], resets) == "selective_scan: resets[1, 2] is 2; it must be 0 or 1");
}
