#include "ops/dropout/dropout.h"

#include <cmath>
#include <limits>

#include "autograd/tape.h"
#include "core/random.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

constexpr DropoutKey key{.seed = 7, .stream = stream_id("layers.0.dropout"), .offset = 1000};

CheckedFunction with_probability(double drop_prob) {
  return [=](const std::vector<Variable>& inputs) {
    return std::vector<Variable>{dropout(inputs[0], drop_prob, key)};
  };
}

std::vector<double> mask_of(int64_t n, double drop_prob, const DropoutKey& used) {
  return dropout(Variable(Tensor::full({n}, 1.0, DType::f64)), drop_prob, used).value().to_vector<double>();
}

}  // namespace

TEST_CASE("dropout: gradient matches finite differences at odd sizes") {
  for (const int64_t n : {1, 7, 100, 257}) {
    INFO(n << " elements");
    CHECK(check_gradient(with_probability(0.3), {random_tensor({3, n}, 1)}) == "");
  }
}

TEST_CASE("dropout: every entry of the Jacobian") {
  CHECK(check_jacobian(with_probability(0.5), {random_tensor({3, 3}, 1)}) == "");
}

TEST_CASE("dropout: the mask is the documented function of the key") {
  const double drop_prob = 0.3;
  const std::vector<double> mask = mask_of(1003, drop_prob, key);
  const Philox philox(key.seed, key.stream);
  for (uint64_t i = 0; i < mask.size(); ++i) {
    const bool dropped = philox.block(key.offset + i / 4)[i % 4] < std::floor(drop_prob * 0x1p32);
    INFO("element " << i);
    REQUIRE(mask[i] == (dropped ? 0.0 : 1.0 / (1.0 - drop_prob)));
  }
}

TEST_CASE("dropout: a GPU drops the same elements, bit for bit") {
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  const DropoutKey far{.seed = 0x123456789abcdef0, .stream = ~uint64_t{0}, .offset = uint64_t{5} << 32};
  for (const int64_t n : {1, 3, 4, 5, 255, 1027, 9999}) {
    for (const int64_t first : {0, 1, 4}) {
      for (const DropoutKey& used : {key, far}) {
        INFO(n << " elements, from element " << first << " on");
        const Tensor x = random_tensor({first + n}, 1).to(DType::f32);
        const auto run = [&](const Tensor& from) {
          return dropout(Variable(from.narrow(first, first + n)), 0.3, used).value().to_vector<float>();
        };
        const std::vector<float> on_cpu = run(x), in_bf16 = run(x.to(DType::bf16).to(gpu));
        CHECK(run(x.to(gpu)) == on_cpu);
        for (size_t i = 0; i < on_cpu.size(); ++i) REQUIRE((in_bf16[i] == 0.0f) == (on_cpu[i] == 0.0f));
      }
    }
  }
  CHECK(check_cuda_bf16(with_probability(0.3), {random_tensor({3, 257}, 1)}, {0}, 4e-3) == "");
}

TEST_CASE("dropout: drops the asked share") {
  const int64_t n = 100000;
  for (const double drop_prob : {0.01, 0.1, 0.5, 0.9}) {
    int64_t n_dropped = 0;
    for (const double value : mask_of(n, drop_prob, key)) n_dropped += value == 0.0;
    // Six standard deviations of the binomial distribution.
    CHECK(std::abs(n_dropped - n * drop_prob) < 6 * std::sqrt(n * drop_prob * (1 - drop_prob)));
  }
}

TEST_CASE("dropout: each part of the key matters") {
  const std::vector<double> mask = mask_of(256, 0.5, key);
  CHECK(mask == mask_of(256, 0.5, key));
  CHECK(mask != mask_of(256, 0.5, {key.seed + 1, key.stream, key.offset}));
  CHECK(mask != mask_of(256, 0.5, {key.seed, key.stream + 1, key.offset}));
  CHECK(mask != mask_of(256, 0.5, {key.seed, key.stream, key.offset + 1}));
}

TEST_CASE("dropout: a part with a moved offset equals that part of the whole") {
  const Tensor x = random_tensor({300}, 1);
  const Tensor whole = dropout(Variable(x), 0.4, key).value();
  const Tensor part =
      dropout(Variable(x.narrow(100, 300)), 0.4, {key.seed, key.stream, key.offset + 100 / 4}).value();
  CHECK(part.to_vector<double>() == whole.narrow(100, 300).to_vector<double>());
}

TEST_CASE("dropout: the bits do not depend on the number of threads") {
  const Variable x(random_tensor({3, 33331}, 1).to(DType::f32));
  const auto run = [&](int n_threads) {
    const WithThreads threads(n_threads);
    return dropout(x, 0.2, key).value().to_vector<float>();
  };
  CHECK(run(1) == run(3));
}

TEST_CASE("dropout: f32 agrees with f64") {
  const Tensor x = random_tensor({1000}, 1);
  // Rounding of x, of the factor and of their product.
  CHECK(relative_error(dropout(Variable(x.to(DType::f32)), 0.3, key).value(),
                       dropout(Variable(x), 0.3, key).value()) < 3 * 6e-8);
}

TEST_CASE("dropout: with probability 0, x itself") {
  const Variable x(random_tensor({5}, 1));
  CHECK(dropout(x, 0.0, key).value().raw_data() == x.value().raw_data());
}

TEST_CASE("dropout: what is dropped does not matter, even a NaN") {
  const Tensor x = Tensor::full({100}, std::numeric_limits<double>::quiet_NaN(), DType::f64);
  const std::vector<double> mask = mask_of(100, 0.5, key);
  const std::vector<double> y = dropout(Variable(x), 0.5, key).value().to_vector<double>();
  for (size_t i = 0; i < y.size(); ++i) CHECK(std::isnan(y[i]) == (mask[i] != 0.0));
}

TEST_CASE("dropout: empty tensors") {
  CHECK(dropout(Variable(Tensor::zeros({0, 3}, DType::f32)), 0.5, key).shape() == Shape{0, 3});
}

TEST_CASE("dropout: names what is wrong") {
  const Variable x(random_tensor({5}, 1));
  CHECK_THROWS_WITH(dropout(x, 1.0, key), "dropout: drop_prob is 1; it must be >= 0 and < 1");
  CHECK_THROWS_WITH(dropout(x, -0.1, key), "dropout: drop_prob is -0.1; it must be >= 0 and < 1");
  CHECK_THROWS_WITH(dropout(x, std::nan(""), key), "dropout: drop_prob is nan; it must be >= 0 and < 1");
  CHECK_THROWS_WITH(dropout(Variable(Tensor::zeros({3}, DType::i32)), 0.5, key),
                    "dropout: dtype i32 is not supported on the CPU; use f32 or f64");
}
