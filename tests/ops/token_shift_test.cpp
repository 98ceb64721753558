#include "ops/token_shift/token_shift.h"

#include "autograd/tape.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

/// x, initial_state, mixes.
std::vector<Tensor> inputs_of(int64_t batch, int64_t length, int64_t channels, int n_mixes) {
  std::vector<Tensor> inputs{random_tensor({batch, length, channels}, 1),
                             random_tensor({batch, channels}, 2)};
  for (int i = 0; i < n_mixes; ++i) inputs.push_back(random_tensor({channels}, 3 + static_cast<uint64_t>(i)));
  return inputs;
}

CheckedFunction with(const Tensor& resets) {
  return [=](const std::vector<Variable>& in) {
    const TokenShiftOutput out =
        token_shift(in[0], {in.begin() + 2, in.end()}, in[1], resets.to(in[0].device()));
    std::vector<Variable> outputs = out.y;
    outputs.push_back(out.final_state);
    return outputs;
  };
}

}  // namespace

TEST_CASE("token_shift: the definition") {
  const Variable x(Tensor::from_vector<double>({1, 3, 1}, {1.0, 2.0, 3.0}));
  const Variable mix(Tensor::from_vector<double>({1}, {0.25}));
  const Variable other(Tensor::from_vector<double>({1}, {1.0}));
  const Variable state(Tensor::from_vector<double>({1, 1}, {8.0}));
  const Tensor resets = Tensor::from_vector<int32_t>({1, 3}, {0, 0, 1});
  const TokenShiftOutput out = token_shift(x, {mix, other}, state, resets);
  CHECK(out.y[0].value().to_vector<double>() == std::vector<double>{6.25, 1.25, 0.75});
  CHECK(out.y[1].value().to_vector<double>() == std::vector<double>{1.0, 2.0, 3.0});
  CHECK(out.final_state.value().to_vector<double>() == std::vector<double>{3.0});
  CHECK(token_shift(x, {mix}).y[0].value().to_vector<double>() == std::vector<double>{0.25, 1.25, 2.25});
}

TEST_CASE("token_shift: gradient matches finite differences at odd sizes") {
  for (const int n_mixes : {1, 2, 3, 4}) {
    for (const int64_t length : {1, 2, 7, 33}) {
      for (const int64_t channels : {1, 5, 12}) {
        INFO(n_mixes << " mixes, length " << length << ", channels " << channels);
        const std::vector<Tensor> inputs = inputs_of(2, length, channels, n_mixes);
        CHECK(check_gradient(with({}), inputs) == "");
        CHECK(check_gradient(with(random_resets(2, length, 0.3)), inputs) == "");
      }
    }
  }
}

TEST_CASE("token_shift: gradients without a state, and where only some outputs are used") {
  const std::vector<Tensor> inputs = inputs_of(2, 300, 8, 2);
  const auto no_state = [](const std::vector<Variable>& in) { return token_shift(in[0], {in[1], in[2]}).y; };
  CHECK(check_gradient(no_state, {inputs[0], inputs[2], inputs[3]}) == "");
  const auto second_only = [](const std::vector<Variable>& in) {
    return std::vector{token_shift(in[0], {in[2], in[3]}, in[1]).y[1]};
  };
  CHECK(check_gradient(second_only, inputs) == "");
  const auto state_only = [](const std::vector<Variable>& in) {
    return std::vector{token_shift(in[0], {in[2], in[3]}, in[1]).final_state};
  };
  CHECK(check_gradient(state_only, inputs) == "");
}

TEST_CASE("token_shift: every entry of the Jacobian") {
  CHECK(check_jacobian(with(Tensor::from_vector<int32_t>({1, 4}, {0, 0, 1, 0})), inputs_of(1, 4, 2, 3)) ==
        "");
}

TEST_CASE("token_shift: bf16 on a GPU agrees with f64") {
  for (const int64_t channels : {3, 40}) {
    INFO("channels " << channels);
    CHECK(check_cuda_bf16(with(random_resets(2, 70, 0.1)), inputs_of(2, 70, channels, 3), {0, 1}) == "");
  }
}

TEST_CASE("token_shift: a sequence in two pieces equals the whole") {
  const std::vector<Tensor> in = inputs_of(2, 9, 5, 1);
  const std::vector<Variable> mixes{Variable(in[2])};
  const TokenShiftOutput whole = token_shift(Variable(in[0]), mixes, Variable(in[1]));
  for (const int64_t cut : {1, 4, 8}) {
    const auto first = token_shift(Variable(steps_of(in[0], 0, cut)), mixes, Variable(in[1]));
    const auto second = token_shift(Variable(steps_of(in[0], cut, 9)), mixes, first.final_state);
    CHECK(relative_error(first.y[0].value(), steps_of(whole.y[0].value(), 0, cut)) == 0.0);
    CHECK(relative_error(second.y[0].value(), steps_of(whole.y[0].value(), cut, 9)) == 0.0);
    CHECK(relative_error(second.final_state.value(), whole.final_state.value()) == 0.0);
  }
}

TEST_CASE("token_shift: f32 agrees with f64") {
  const std::vector<Tensor> in = inputs_of(2, 50, 67, 1);
  const auto y = [&](DType dtype) {
    return token_shift(Variable(in[0].to(dtype)), {Variable(in[2].to(dtype))}).y[0].value();
  };
  CHECK(relative_error(y(DType::f32), y(DType::f64)) < 10 * 6e-8);  // two products and two sums
}

TEST_CASE("token_shift: the same bits with 1 and several threads") {
  const std::vector<Tensor> in = inputs_of(3, 100, 20, 2);
  const auto gradients = [&](int threads) {
    const WithThreads scope(threads);
    std::vector<Variable> leaves;
    for (const Tensor& input : in) leaves.push_back(Variable::leaf(input.to(DType::f32)));
    Tape tape;
    const std::vector<Variable> outputs = with({})(leaves);
    std::vector<Tensor> cotangents;
    for (const Variable& output : outputs)
      cotangents.push_back(random_tensor(output.shape(), 8).to(DType::f32));
    tape.backward(outputs, cotangents);
    std::vector<Tensor> results;
    for (const Variable& leaf : leaves) results.push_back(leaf.gradient().tensor());
    return results;
  };
  const std::vector<Tensor> one = gradients(1), several = gradients(5);
  for (size_t i = 0; i < one.size(); ++i) CHECK(relative_error(one[i], several[i]) == 0.0);
}

TEST_CASE("token_shift: names what is wrong") {
  const Variable x(random_tensor({2, 5, 3}, 1)), mix(random_tensor({3}, 2));
  CHECK_THROWS_WITH(token_shift(Variable(random_tensor({5, 3}, 1)), {mix}),
                    "token_shift: x has shape (5, 3); it must be (batch, length, channels)");
  CHECK_THROWS_WITH(token_shift(Variable(random_tensor({2, 0, 3}, 1)), {mix}),
                    "token_shift: length is 0; a sequence has at least one step");
  CHECK_THROWS_WITH(token_shift(x, {}), "token_shift: there are 0 mixes; 1 to 4 can be made at once");
  CHECK_THROWS_WITH(token_shift(x, {mix, Variable(random_tensor({4}, 1))}),
                    "token_shift: a mix has shape (4); it must be (channels) = (3)");
  CHECK_THROWS_WITH(token_shift(x, {mix}, Variable(random_tensor({3, 3}, 1))),
                    "token_shift: initial_state has shape (3, 3); it must be (batch, channels) = (2, 3)");
  CHECK_THROWS_WITH(token_shift(x, {mix}, {}, Tensor::full({2, 5}, 2, DType::i32)),
                    "token_shift: resets[0, 0] is 2; it must be 0 or 1");
}
