#include "ops/causal_conv1d/causal_conv1d.h"

#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"

using namespace headwater;

namespace {

struct Sizes {
  int64_t batch, length, channels, d_conv;
};

/// x, weight, bias, initial_state.
std::vector<Tensor> inputs_of(const Sizes& sizes, int64_t state_rows) {
  return {random_tensor({sizes.batch, sizes.length, sizes.channels}, 1),
          random_tensor({sizes.channels, sizes.d_conv}, 2), random_tensor({sizes.channels}, 3),
          random_tensor({sizes.batch, state_rows, sizes.channels}, 4)};
}

Tensor every_fifth_reset(int64_t batch, int64_t length) {
  const Tensor resets = Tensor::zeros({batch, length}, DType::i32);
  for (int64_t i = 2; i < batch * length; i += 5) resets.data<int32_t>()[i] = 1;
  return resets;
}

CheckedFunction with(const Tensor& resets, const CausalConv1dOptions& options) {
  return [=](const std::vector<Variable>& in) {
    const CausalConv1dOutput out =
        causal_conv1d(in[0], in[1], in[2], in[3], resets.to(in[0].device()), options);
    return std::vector<Variable>{out.y, out.final_state};
  };
}

}  // namespace

TEST_CASE("causal_conv1d: the definition") {
  const Tensor x = Tensor::from_vector<double>({1, 3, 1}, {1.0, 2.0, 3.0});
  const Tensor weight = Tensor::from_vector<double>({1, 2}, {10.0, 1.0});
  const Variable y = causal_conv1d(Variable(x), Variable(weight), {}, {}, {}, {.silu = false}).y;
  CHECK(y.value().to_vector<double>() == std::vector<double>{1.0, 12.0, 23.0});
}

TEST_CASE("causal_conv1d: gradient matches finite differences at odd sizes") {
  for (const Sizes sizes :
       {Sizes{1, 1, 1, 4}, Sizes{2, 7, 3, 4}, Sizes{1, 100, 7, 3}, Sizes{3, 257, 5, 4}, Sizes{2, 33, 4, 1}}) {
    INFO("length " << sizes.length << ", d_conv " << sizes.d_conv);
    const std::vector<Tensor> inputs = inputs_of(sizes, sizes.d_conv + 1);
    const Tensor resets = every_fifth_reset(sizes.batch, sizes.length);
    CHECK(check_gradient(with({}, {}), inputs) == "");
    CHECK(check_gradient(with(resets, {.silu = false, .state_length = sizes.d_conv}), inputs) == "");
  }
}

TEST_CASE("causal_conv1d: f32 and bf16 on a GPU agree with f64") {
  // Stretches of 16 steps, walked 4 or 2 at a time; windows of 2 to 4 in registers, four channels at a time where they
  // can be packed.
  for (const int64_t d_conv : {1, 2, 3, 4, 5}) {
    for (const int64_t length : {1, 2, 3, 15, 16, 17, 33, 64}) {
      for (const int64_t channels : {3, 12}) {
        INFO("length " << length << ", channels " << channels << ", d_conv " << d_conv);
        const std::vector<Tensor> inputs = inputs_of({2, length, channels, d_conv}, d_conv + 1);
        const Tensor resets = every_fifth_reset(2, length);
        // A final state that reaches beyond the initial one, where the sequence is short.
        const CausalConv1dOptions long_state{.silu = false, .state_length = d_conv + 4};
        CHECK(check_cuda(with(resets, {}), inputs) == "");
        CHECK(check_cuda(with({}, long_state), inputs) == "");
        CHECK(check_cuda_bf16(with(resets, long_state), inputs, {0, 3}) == "");
        CHECK(check_cuda_bf16(with({}, {}), inputs, {0, 3}) == "");
      }
    }
  }
}

TEST_CASE("causal_conv1d: a document that starts anywhere near a stretch's border, on a GPU") {
  const std::vector<Tensor> inputs = inputs_of({1, 40, 4, 4}, 3);
  for (int64_t start = 0; start < 40; start += start < 12 || start > 20 ? 3 : 1) {
    INFO("start " << start);
    const Tensor resets = Tensor::zeros({1, 40}, DType::i32);
    resets.data<int32_t>()[start] = 1;
    CHECK(check_cuda(with(resets, {.state_length = 5}), inputs) == "");
  }
}

TEST_CASE("causal_conv1d: on a GPU without bias, initial state, or use of one of the outputs") {
  for (const int64_t d_conv : {4, 6}) {
    const std::vector<Tensor> inputs = inputs_of({2, 19, 8, d_conv}, d_conv - 1);
    const auto without = [](const std::vector<Variable>& in) {
      const CausalConv1dOutput out = causal_conv1d(in[0], in[1]);
      return std::vector<Variable>{out.y, out.final_state};
    };
    CHECK(check_cuda(without, {inputs[0], inputs[1]}) == "");
    const auto only_y = [](const std::vector<Variable>& in) {
      return std::vector<Variable>{causal_conv1d(in[0], in[1], in[2], in[3]).y};
    };
    CHECK(check_cuda(only_y, inputs) == "");
    const auto only_state = [](const std::vector<Variable>& in) {
      return std::vector<Variable>{causal_conv1d(in[0], in[1], in[2], in[3]).final_state};
    };
    CHECK(check_cuda(only_state, inputs) == "");
  }
}

TEST_CASE("causal_conv1d: every entry of the Jacobian") {
  CHECK(check_jacobian(with(every_fifth_reset(1, 6), {}), inputs_of({1, 6, 2, 3}, 2)) == "");
}

TEST_CASE("causal_conv1d: a sequence in two pieces equals the whole") {
  const Sizes sizes{2, 23, 5, 4};
  const std::vector<Tensor> in = inputs_of(sizes, 3);
  const Variable weight(in[1]), bias(in[2]);
  const CausalConv1dOutput whole = causal_conv1d(Variable(in[0]), weight, bias, Variable(in[3]));
  for (const int64_t cut : {1, 2, 3, 4, 22}) {
    const auto first = causal_conv1d(Variable(steps_of(in[0], 0, cut)), weight, bias, Variable(in[3]));
    const auto second = causal_conv1d(Variable(steps_of(in[0], cut, 23)), weight, bias, first.final_state);
    CHECK(relative_error(first.y.value(), steps_of(whole.y.value(), 0, cut)) < 1e-15);
    CHECK(relative_error(second.y.value(), steps_of(whole.y.value(), cut, 23)) < 1e-15);
    CHECK(relative_error(second.final_state.value(), whole.final_state.value()) == 0.0);
  }
}

TEST_CASE("causal_conv1d: a packed row equals its documents one by one") {
  const std::vector<Tensor> in = inputs_of({1, 9, 3, 4}, 3);
  const Tensor resets = Tensor::from_vector<int32_t>({1, 9}, {0, 0, 1, 1, 0, 0, 0, 0, 0});
  const Variable weight(in[1]), bias(in[2]);
  const auto packed = causal_conv1d(Variable(in[0]), weight, bias, {}, resets);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 2}, {2, 3}, {3, 9}}) {
    const auto alone = causal_conv1d(Variable(steps_of(in[0], begin, end)), weight, bias);
    CHECK(relative_error(alone.y.value(), steps_of(packed.y.value(), begin, end)) < 1e-15);
    if (end == 9) CHECK(relative_error(alone.final_state.value(), packed.final_state.value()) == 0.0);
  }
}

TEST_CASE("causal_conv1d: f32 agrees with f64") {
  const std::vector<Tensor> in = inputs_of({2, 100, 67, 4}, 3);
  const auto run = [&](DType dtype) {
    std::vector<Variable> v;
    for (const Tensor& input : in) v.emplace_back(input.to(dtype));
    return causal_conv1d(v[0], v[1], v[2], v[3]).y.value();
  };
  CHECK(relative_error(run(DType::f32), run(DType::f64)) < 10 * 6e-8);
}

TEST_CASE("causal_conv1d: names what is wrong") {
  const Variable x(random_tensor({2, 5, 3}, 1)), weight(random_tensor({3, 4}, 2));
  CHECK_THROWS_WITH(
      causal_conv1d(x, Variable(random_tensor({4, 4}, 2))),
      "causal_conv1d: weight has shape (4, 4); it must be (channels, d_conv) with channels = 3");
  CHECK_THROWS_WITH(
      causal_conv1d(x, weight, {}, Variable(random_tensor({2, 2, 3}, 3))),
      "causal_conv1d: initial_state has shape (2, 2, 3); it must be (batch, at least d_conv - 1, "
      "channels) = (2, >= 3, 3)");
  CHECK_THROWS_WITH(causal_conv1d(x, Variable(weight.value().to(DType::f32))),
                    "causal_conv1d: weight is f32; beside f64 arguments it must be f64");
  const Tensor resets = Tensor::zeros({2, 5}, DType::i32);
  if (has_cuda()) {
    CHECK_THROWS_WITH(causal_conv1d(x, weight, {}, {}, resets.to(parse_device("cuda"))),
                      "causal_conv1d: resets are on cuda:0; they must be on cpu like the other arguments");
  }
  resets.data<int32_t>()[7] = 2;
  CHECK_THROWS_WITH(causal_conv1d(x, weight, {}, {}, resets),
                    "causal_conv1d: resets[1, 2] is 2; it must be 0 or 1");
}
