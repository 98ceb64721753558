#include "ops/wkv/wkv.h"

#include <cmath>

#include "autograd/tape.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

/// k, v, time_decay, time_first, initial_state.
std::vector<Tensor> inputs_of(int64_t batch, int64_t length, int64_t channels, double k_scale = 1.0) {
  return {random_tensor({batch, length, channels}, 1, k_scale), random_tensor({batch, length, channels}, 2),
          random_tensor({channels}, 3), random_tensor({channels}, 4), random_tensor({batch, 2, channels}, 5)};
}

WkvOutput run(const std::vector<Variable>& in, const Tensor& resets, bool with_state) {
  return wkv({.k = in[0],
              .v = in[1],
              .time_decay = in[2],
              .time_first = in[3],
              .initial_state = with_state ? in[4] : Variable(),
              .resets = resets.to(in[0].device())});
}

CheckedFunction with(const Tensor& resets, bool with_state = true) {
  return [=](const std::vector<Variable>& in) {
    const WkvOutput out = run(in, resets, with_state);
    return std::vector<Variable>{out.y, out.final_state};
  };
}

std::vector<Variable> constants(const std::vector<Tensor>& tensors, DType dtype = DType::f64) {
  std::vector<Variable> variables;
  for (const Tensor& tensor : tensors) variables.emplace_back(tensor.to(dtype));
  return variables;
}

}  // namespace

TEST_CASE("wkv: the definition, as a sum over the past") {
  const int64_t length = 70, channels = 3;
  const std::vector<Tensor> in = inputs_of(1, length, channels);
  const Tensor y = run(constants(in), {}, false).y.value();
  for (int64_t c = 0; c < channels; ++c) {
    const auto k = [&](int64_t t) { return in[0].data<double>()[t * channels + c]; };
    const auto v = [&](int64_t t) { return in[1].data<double>()[t * channels + c]; };
    const double w = std::exp(in[2].data<double>()[c]), u = in[3].data<double>()[c];
    for (int64_t t = 0; t < length; ++t) {
      double weight = std::exp(u + k(t)), sum = weight * v(t);
      for (int64_t s = 0; s < t; ++s) {
        const double past = std::exp(k(s) - static_cast<double>(t - 1 - s) * w);
        weight += past;
        sum += past * v(s);
      }
      INFO("step " << t << ", channel " << c);
      CHECK(y.data<double>()[t * channels + c] == Approx(sum / weight).epsilon(1e-12));
    }
  }
}

TEST_CASE("wkv: gradient matches finite differences at odd sizes and around every stretch") {
  for (const int64_t length : {1, 2, 31, 32, 33, 70}) {
    for (const int64_t channels : {1, 5, 67}) {
      if (channels == 67 && length > 33) continue;
      INFO("length " << length << ", channels " << channels);
      const std::vector<Tensor> inputs = inputs_of(2, length, channels);
      CHECK(check_gradient(with({}), inputs) == "");
      CHECK(check_gradient(with(random_resets(2, length, 0.1)), inputs) == "");
    }
  }
}

TEST_CASE("wkv: gradients of a long sequence, alone and without a state") {
  std::vector<Tensor> inputs = inputs_of(1, 300, 4);
  // Slow decays: the gradient of early steps comes from far away.
  inputs[2] = random_tensor({4}, 3, 0.3);
  for (int64_t i = 0; i < 4; ++i) inputs[2].data<double>()[i] -= 4.0;
  inputs.pop_back();
  CHECK(check_gradient(with({}, false), inputs) == "");
  CHECK(check_gradient(with(random_resets(1, 300, 0.01), false), inputs) == "");
}

TEST_CASE("wkv: gradients where only one of the outputs is used") {
  const std::vector<Tensor> inputs = inputs_of(2, 40, 3);
  CHECK(check_gradient([](const std::vector<Variable>& in) { return std::vector{run(in, {}, true).y}; },
                       inputs) == "");
  CHECK(check_gradient(
            [](const std::vector<Variable>& in) { return std::vector{run(in, {}, true).final_state}; },
            inputs) == "");
}

TEST_CASE("wkv: every entry of the Jacobian") {
  const Tensor resets = Tensor::from_vector<int32_t>({1, 5}, {0, 0, 0, 1, 0});
  CHECK(check_jacobian(with({}), inputs_of(1, 5, 2)) == "");
  CHECK(check_jacobian(with(resets), inputs_of(1, 5, 2)) == "");
}

TEST_CASE("wkv: bf16 on a GPU agrees with f64") {
  for (const int64_t length : {1, 33, 64, 130}) {
    INFO("length " << length);
    CHECK(check_cuda_bf16(with(random_resets(2, length, 0.05)), inputs_of(2, length, 40), {0, 1}) == "");
  }
}

TEST_CASE("wkv: so many channels that a thread on a GPU walks several stretches") {
  // 2 pieces of 2 stretches and 1; then 1 piece.
  CHECK(check_cuda(with(random_resets(1, 70, 0.02)), inputs_of(1, 70, 22000)) == "");
  CHECK(check_cuda(with(random_resets(1, 40, 0.02)), inputs_of(1, 40, 33000)) == "");
}

TEST_CASE("wkv: exponents of +-1000 give finite averages and gradients") {
  for (const DType dtype : {DType::f32, DType::f64}) {
    std::vector<Variable> leaves;
    for (const Tensor& input : inputs_of(2, 100, 9, 500.0)) leaves.push_back(Variable::leaf(input.to(dtype)));
    Tape tape;
    const WkvOutput out = run(leaves, {}, true);
    tape.backward({out.y, out.final_state}, {random_tensor(out.y.shape(), 8).to(dtype),
                                             random_tensor(out.final_state.shape(), 9).to(dtype)});
    double largest = 0.0;
    for (const double v : leaves[1].value().to_vector<double>()) largest = std::max(largest, std::abs(v));
    for (const double v : leaves[4].value().to_vector<double>()) largest = std::max(largest, std::abs(v));
    for (const double y : out.y.value().to_vector<double>()) CHECK(std::abs(y) <= largest);
    for (const Variable& leaf : leaves) {
      for (const double g : leaf.gradient().tensor().to_vector<double>()) CHECK(std::isfinite(g));
    }
  }
}

TEST_CASE("wkv: the first step without a past gives its v, to the bit") {
  const std::vector<Variable> in = constants(inputs_of(3, 1, 7, 50.0), DType::f32);
  CHECK(relative_error(run(in, {}, false).y.value(), in[1].value()) == 0.0);
}

TEST_CASE("wkv: pieces equal the whole, to the bit where a stretch ends") {
  const std::vector<Tensor> in = inputs_of(2, 70, 5);
  const Tensor resets = random_resets(2, 70, 0.05);
  const WkvOutput whole = run(constants(in), resets, true);
  for (const int64_t cut : {1, 31, 32, 33, 69}) {
    const auto piece = [&](int64_t begin, int64_t end, const Variable& state) {
      return wkv({.k = Variable(steps_of(in[0], begin, end)),
                  .v = Variable(steps_of(in[1], begin, end)),
                  .time_decay = Variable(in[2]),
                  .time_first = Variable(in[3]),
                  .initial_state = state,
                  .resets = steps_of(resets, begin, end)});
    };
    const WkvOutput first = piece(0, cut, Variable(in[4])), second = piece(cut, 70, first.final_state);
    CHECK(relative_error(first.y.value(), steps_of(whole.y.value(), 0, cut)) == 0.0);
    CHECK(relative_error(second.y.value(), steps_of(whole.y.value(), cut, 70)) == 0.0);
    CHECK(relative_error(second.final_state.value(), whole.final_state.value()) == 0.0);
  }
}

TEST_CASE("wkv: a packed row equals its documents one by one") {
  const std::vector<Tensor> in = inputs_of(1, 50, 5);
  const Tensor resets = Tensor::zeros({1, 50}, DType::i32);
  for (const int64_t start : {7, 8, 40}) resets.data<int32_t>()[start] = 1;
  const WkvOutput packed = run(constants(in), resets, false);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 7}, {7, 8}, {8, 40}, {40, 50}}) {
    const WkvOutput alone =
        run(constants({steps_of(in[0], begin, end), steps_of(in[1], begin, end), in[2], in[3]}), {}, false);
    CHECK(relative_error(alone.y.value(), steps_of(packed.y.value(), begin, end)) == 0.0);
    if (end == 50) CHECK(relative_error(alone.final_state.value(), packed.final_state.value()) == 0.0);
  }
}

TEST_CASE("wkv: f32 agrees with f64") {
  const std::vector<Tensor> in = inputs_of(2, 200, 67, 3.0);
  const auto y = [&](DType dtype) { return run(constants(in, dtype), {}, true).y.value(); };
  // Exponents of about 10 are rounded at every step, and each rounding is a relative error of a weight.
  CHECK(relative_error(y(DType::f32), y(DType::f64)) < 100 * 6e-8);
}

TEST_CASE("wkv: the same bits with 1 and several threads") {
  const std::vector<Tensor> in = inputs_of(3, 65, 200);
  const auto gradients = [&](int threads) {
    const WithThreads scope(threads);
    std::vector<Variable> leaves;
    for (const Tensor& input : in) leaves.push_back(Variable::leaf(input.to(DType::f32)));
    Tape tape;
    const WkvOutput out = run(leaves, {}, true);
    tape.backward({out.y}, {random_tensor(out.y.shape(), 8).to(DType::f32)});
    std::vector<Tensor> results{out.y.value()};
    for (const Variable& leaf : leaves) results.push_back(leaf.gradient().tensor());
    return results;
  };
  const std::vector<Tensor> one = gradients(1), several = gradients(5);
  for (size_t i = 0; i < one.size(); ++i) CHECK(relative_error(one[i], several[i]) == 0.0);
}

TEST_CASE("wkv: names what is wrong") {
  const auto call = [](const std::vector<Tensor>& in, const Tensor& resets = {}) {
    run(constants(in), resets, true);
  };
  const std::vector<Tensor> good = inputs_of(2, 5, 3);
  const auto with_input = [&](size_t i, const Tensor& tensor) {
    std::vector<Tensor> in = good;
    in[i] = tensor;
    return in;
  };
  CHECK_THROWS_WITH(call(with_input(0, random_tensor({2, 5}, 1))),
                    "wkv: k has shape (2, 5); it must be (batch, length, channels)");
  CHECK_THROWS_WITH(call(with_input(1, random_tensor({2, 4, 3}, 1))),
                    "wkv: v has shape (2, 4, 3); it must be (batch, length, channels) = (2, 5, 3)");
  CHECK_THROWS_WITH(call(with_input(2, random_tensor({4}, 1))),
                    "wkv: time_decay has shape (4); it must be (channels) = (3)");
  CHECK_THROWS_WITH(call(with_input(4, random_tensor({2, 3}, 1))),
                    "wkv: initial_state has shape (2, 3); it must be (batch, 2, channels) = (2, 2, 3)");
  CHECK_THROWS_WITH(run(constants(inputs_of(2, 0, 3)), {}, true),
                    "wkv: length is 0; a sequence has at least one step");
  std::vector<Variable> mixed = constants(good);
  mixed[3] = Variable(good[3].to(DType::f32));
  CHECK_THROWS_WITH(run(mixed, {}, true), "wkv: time_first is f32; beside f64 arguments it must be f64");
  CHECK_THROWS_WITH(call(good, Tensor::full({2, 5}, 2, DType::i32)),
                    "wkv: resets[0, 0] is 2; it must be 0 or 1");
}
