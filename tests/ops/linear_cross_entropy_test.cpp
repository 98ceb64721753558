#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "autograd/tape.h"
#include "core/memory.h"
#include "core/random.h"
#include "ops/embedding/embedding.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

/// Random targets below `vocab_size`; every `ignore_every`-th row does not count (0: all count).
Tensor random_targets(const Shape& shape, int64_t vocab_size, int64_t ignore_every = 0) {
  RandomStream random(1, "targets");
  const Tensor targets = Tensor::empty(shape, DType::i32);
  for (int64_t i = 0; i < targets.numel(); ++i) {
    const bool ignored = ignore_every > 0 && i % ignore_every == 0;
    targets.data<int32_t>()[i] =
        ignored ? ignored_target : static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab_size)));
  }
  return targets;
}

CheckedFunction loss_of(const Tensor& targets, const LinearCrossEntropyOptions& options = {}) {
  return [=](const std::vector<Variable>& inputs) {
    const Tensor moved = targets.to(inputs[0].device());
    return std::vector<Variable>{linear_cross_entropy(inputs[0], inputs[1], moved, options).loss};
  };
}

struct Results {
  Tensor loss, row_losses, row_correct, grad_hidden, grad_weight;
  int64_t n_targets;
};

/// The operator and its backward from d loss = scale.
Results run(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
            const LinearCrossEntropyOptions& options = {}, double scale = 1.0) {
  const Variable h = Variable::leaf(hidden);
  const Variable w = Variable::leaf(weight);
  Tape tape;
  const LinearCrossEntropyOutput output = linear_cross_entropy(h, w, targets, options);
  tape.backward(output.loss, scale);
  return {output.loss.value(),   output.row_losses,     output.row_correct,
          h.gradient().tensor(), w.gradient().tensor(), output.n_targets.to_vector<int64_t>()[0]};
}

/// Where a test can run: the CPU, and the GPU or its emulation.
std::vector<Device> devices() {
  std::vector<Device> found{Device{}};
  if (has_cuda()) found.push_back(parse_device("cuda"));
  return found;
}

/// The definition, with all logits at once.
Results unfused(const Tensor& hidden, const Tensor& weight, const Tensor& targets, double divisor) {
  const int64_t vocab_size = weight.dim(0), d_model = weight.dim(1), rows = targets.numel();
  const double* h = hidden.data<double>();
  const double* w = weight.data<double>();
  Results results{Tensor::zeros({}, DType::f64),
                  Tensor::zeros({rows}, DType::f64),
                  Tensor::zeros({rows}, DType::u8),
                  zeros_like(hidden),
                  zeros_like(weight),
                  0};
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t target = targets.data<int32_t>()[row];
    if (target == ignored_target) continue;
    std::vector<double> logits(vocab_size);
    double sum = 0.0;
    for (int64_t v = 0; v < vocab_size; ++v) {
      for (int64_t j = 0; j < d_model; ++j) logits[v] += h[row * d_model + j] * w[v * d_model + j];
      sum += std::exp(logits[v]);
    }
    results.row_losses.data<double>()[row] = std::log(sum) - logits[target];
    results.row_correct.data<uint8_t>()[row] =
        std::max_element(logits.begin(), logits.end()) == logits.begin() + target;
    *results.loss.data<double>() += results.row_losses.data<double>()[row] / divisor;
    ++results.n_targets;
    for (int64_t v = 0; v < vocab_size; ++v) {
      const double grad_logit = (std::exp(logits[v]) / sum - (v == target ? 1.0 : 0.0)) / divisor;
      for (int64_t j = 0; j < d_model; ++j) {
        results.grad_hidden.data<double>()[row * d_model + j] += grad_logit * w[v * d_model + j];
        results.grad_weight.data<double>()[v * d_model + j] += grad_logit * h[row * d_model + j];
      }
    }
  }
  return results;
}

void check_equal(const Results& a, const Results& b, double tolerance) {
  CHECK(relative_error(a.loss, b.loss) < tolerance);
  CHECK(relative_error(a.row_losses, b.row_losses) < tolerance);
  CHECK(a.row_correct.to_vector<uint8_t>() == b.row_correct.to_vector<uint8_t>());
  CHECK(relative_error(a.grad_hidden, b.grad_hidden) < tolerance);
  CHECK(relative_error(a.grad_weight, b.grad_weight) < tolerance);
  CHECK(a.n_targets == b.n_targets);
}

}  // namespace

TEST_CASE("linear_cross_entropy: equals the unfused composition") {
  for (const int64_t rows : {1, 7, 100, 257}) {
    for (const int64_t ignore_every : {0, 3}) {
      INFO(rows << " rows, one in " << ignore_every << " ignored");
      const int64_t d_model = 33, vocab_size = 29;
      const Tensor hidden = random_tensor({rows, d_model}, 1, 0.5);
      const Tensor weight = random_tensor({vocab_size, d_model}, 2, 0.5);
      const Tensor targets = random_targets({rows}, vocab_size, ignore_every);
      const auto is_counted = [](int32_t target) { return target != ignored_target; };
      const std::vector<int32_t> values = targets.to_vector<int32_t>();
      const auto n_targets = std::count_if(values.begin(), values.end(), is_counted);
      const Results expected = unfused(hidden, weight, targets, std::max<double>(1, n_targets));
      check_equal(run(hidden, weight, targets), expected, 1e-13);
      check_equal(run(hidden, weight, targets, {.row_block = 16}), expected, 1e-13);
    }
  }
}

TEST_CASE("linear_cross_entropy: gradient matches finite differences at odd sizes") {
  for (const int64_t length : {1, 7, 100, 257}) {
    for (const int64_t d_model : {1, 7, 33}) {
      INFO("length " << length << ", d_model " << d_model);
      const int64_t vocab_size = 29;
      const std::vector<Tensor> inputs{random_tensor({2, length, d_model}, 1),
                                       random_tensor({vocab_size, d_model}, 2)};
      CHECK(check_gradient(loss_of(random_targets({2, length}, vocab_size)), inputs) == "");
      CHECK(check_gradient(
                loss_of(random_targets({2, length}, vocab_size, 4), {.row_block = 16, .divisor = 50}),
                inputs) == "");
    }
  }
}

TEST_CASE("linear_cross_entropy: f32 and bf16 on a GPU agree with f64") {
  // Logits are read four at a time, by 32 threads for each 512, up to 512 threads; gradients overwrite them.
  for (const int64_t vocab_size : {1, 3, 4, 5, 127, 128, 129, 511, 512, 513, 1030, 9001}) {
    for (const int64_t d_model : {8, 9}) {
      INFO("vocab_size " << vocab_size << ", d_model " << d_model);
      // With a vocabulary of one the loss and its gradients are exactly 0, so that no rounding is small beside them.
      const int64_t rows = 21;
      const double tolerance = vocab_size == 1 ? 1e30 : 1e-5, bf16_tolerance = vocab_size == 1 ? 1e30 : 2e-2;
      const std::vector<Tensor> inputs{random_tensor({rows, d_model}, 1),
                                       random_tensor({vocab_size, d_model}, 2)};
      const CheckedFunction all_rows = loss_of(random_targets({rows}, vocab_size));
      const CheckedFunction some_rows =
          loss_of(random_targets({rows}, vocab_size, 4), {.row_block = 10, .divisor = 50});
      CHECK(check_cuda(all_rows, inputs, tolerance) == "");
      CHECK(check_cuda(some_rows, inputs, tolerance) == "");
      CHECK(check_cuda_bf16(all_rows, inputs, {0, 1}, bf16_tolerance) == "");
      CHECK(check_cuda_bf16(some_rows, inputs, {0, 1}, bf16_tolerance) == "");
    }
  }
}

TEST_CASE("linear_cross_entropy: every result on a GPU agrees with f64, ignored rows hold what they like") {
  if (!has_cuda()) return;
  const Device cuda = parse_device("cuda");
  for (const int64_t rows : {0, 1, 7, 100}) {
    for (const int64_t ignore_every : {0, 1, 3}) {
      INFO(rows << " rows, one in " << ignore_every << " ignored");
      const Tensor hidden = random_tensor({rows, 12}, 1).to(DType::f32);
      const Tensor weight = random_tensor({150, 12}, 2).to(DType::f32);
      const Tensor targets = random_targets({rows}, 150, ignore_every);
      for (int64_t row = 0; ignore_every > 0 && row < rows; row += ignore_every)
        hidden.narrow(row, row + 1).fill(std::numeric_limits<double>::quiet_NaN());
      const Results expected = run(hidden.to(DType::f64), weight.to(DType::f64), targets, {}, -4.0);
      for (const int64_t row_block : {0, 16}) {
        const Results results =
            run(hidden.to(cuda), weight.to(cuda), targets.to(cuda), {.row_block = row_block}, -4.0);
        check_equal(results, expected, 1e-5);
      }
    }
  }
}

TEST_CASE("linear_cross_entropy: a target that does not exist makes the loss NaN on a GPU") {
  if (!has_cuda()) return;
  const Device cuda = parse_device("cuda");
  const Tensor hidden = random_tensor({3, 8}, 1).to(DType::f32).to(cuda);
  const Tensor weight = random_tensor({29, 8}, 2).to(DType::f32).to(cuda);
  for (const int32_t wrong : {29, -2}) {
    const Results results = run(hidden, weight, Tensor::from_vector<int32_t>({3}, {5, wrong, 28}).to(cuda));
    CHECK(std::isnan(results.loss.to_vector<float>()[0]));
    const std::vector<float> losses = results.row_losses.to_vector<float>();
    CHECK((std::isfinite(losses[0]) && std::isnan(losses[1]) && std::isfinite(losses[2])));
  }
}

TEST_CASE("linear_cross_entropy: a divisor in memory is the same as a number") {
  const Tensor hidden = random_tensor({10, 7}, 1).to(DType::f32);
  const Tensor weight = random_tensor({29, 7}, 2).to(DType::f32);
  const Tensor targets = random_targets({10}, 29, 4), divisor = Tensor::full({}, 50, DType::i64);
  for (const Device device : devices()) {
    const Tensor h = hidden.to(device), w = weight.to(device), t = targets.to(device);
    check_equal(run(h, w, t, {.divisor_tensor = divisor.to(device)}), run(h, w, t, {.divisor = 50}), 1e-30);
  }
}

TEST_CASE("linear_cross_entropy: every entry of the Jacobian") {
  CHECK(check_jacobian(loss_of(random_targets({4}, 3, 3)),
                       {random_tensor({4, 2}, 1), random_tensor({3, 2}, 2)}) == "");
}

TEST_CASE("linear_cross_entropy: blocks of any size give the same") {
  const Tensor hidden = random_tensor({100, 7}, 1);
  const Tensor weight = random_tensor({29, 7}, 2);
  const Tensor targets = random_targets({100}, 29, 5);
  const Results whole = run(hidden, weight, targets);
  for (const int64_t row_block : {1, 7, 79, 80, 81, 1000}) {
    INFO("row_block " << row_block);
    // In f64 even the order of all sums is the same; only multiply-adds may be fused differently.
    check_equal(run(hidden, weight, targets, {.row_block = row_block}), whole, 1e-14);
  }
}

TEST_CASE("linear_cross_entropy: micro-batches with a common divisor add up to the whole batch") {
  const Tensor hidden = random_tensor({100, 7}, 1);
  const Tensor weight = random_tensor({29, 7}, 2);
  const Tensor targets = random_targets({100}, 29, 5);
  const Results whole = run(hidden, weight, targets);
  const Variable parameter = Variable::parameter(weight, zeros_like(weight));
  double loss = 0.0;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 30}, {30, 100}}) {
    Tape tape;
    const LinearCrossEntropyOutput part =
        linear_cross_entropy(Variable(hidden.narrow(begin, end)), parameter, targets.narrow(begin, end),
                             {.divisor = whole.n_targets});
    tape.backward(part.loss);
    loss += *part.loss.value().data<double>();
  }
  CHECK(std::abs(loss - *whole.loss.data<double>()) < 1e-14);
  CHECK(relative_error(parameter.gradient().tensor(), whole.grad_weight) < 1e-14);
}

TEST_CASE("linear_cross_entropy: the gradient of the loss scales all gradients") {
  const Tensor hidden = random_tensor({10, 7}, 1);
  const Tensor weight = random_tensor({29, 7}, 2);
  const Tensor targets = random_targets({10}, 29);
  const Results once = run(hidden, weight, targets);
  const Results scaled = run(hidden, weight, targets, {}, -4.0);
  scale_in_place(once.grad_hidden, -4.0);
  scale_in_place(once.grad_weight, -4.0);
  check_equal(scaled, once, 1e-15);
}

TEST_CASE("linear_cross_entropy: gradients go only where they are wanted") {
  const Tensor hidden = random_tensor({10, 7}, 1);
  const Tensor weight = random_tensor({29, 7}, 2);
  const Tensor targets = random_targets({10}, 29);
  const Results both = run(hidden, weight, targets);
  const Variable h = Variable::leaf(hidden);
  const Variable w = Variable::leaf(weight);
  Tape tape;
  const Variable for_hidden = linear_cross_entropy(h, Variable(weight), targets).loss;
  const Variable for_weight = linear_cross_entropy(Variable(hidden), w, targets).loss;
  const Variable for_none = linear_cross_entropy(Variable(hidden), Variable(weight), targets).loss;
  const Tensor one = Tensor::full({}, 1.0, DType::f64);
  tape.backward({for_hidden, for_weight}, {one, one});
  CHECK(h.gradient().tensor().to_vector<double>() == both.grad_hidden.to_vector<double>());
  CHECK(w.gradient().tensor().to_vector<double>() == both.grad_weight.to_vector<double>());
  CHECK_FALSE(for_none.requires_gradient());
}

TEST_CASE("linear_cross_entropy: a weight tied to the embedding gathers both gradients") {
  const Tensor tokens = random_targets({2, 50}, 29);
  const Tensor targets = random_targets({2, 50}, 29, 6);
  const CheckedFunction tied = [=](const std::vector<Variable>& inputs) {
    const Device device = inputs[0].device();
    const Variable hidden = embedding(tokens.to(device), inputs[0]);
    return std::vector<Variable>{linear_cross_entropy(hidden, inputs[0], targets.to(device)).loss};
  };
  CHECK(check_gradient(tied, {random_tensor({29, 7}, 1)}) == "");
}

TEST_CASE("linear_cross_entropy: ignored rows are not read and get no gradient") {
  const Tensor hidden = random_tensor({6, 7}, 1);
  const Tensor weight = random_tensor({29, 7}, 2);
  const Tensor targets = random_targets({6}, 29, 3);  // rows 0 and 3 are ignored
  for (const int64_t row : {0, 3}) hidden.narrow(row, row + 1).fill(std::numeric_limits<double>::quiet_NaN());
  const Results results = run(hidden, weight, targets);
  CHECK(results.n_targets == 4);
  CHECK(std::isfinite(*results.loss.data<double>()));
  for (const int64_t row : {0, 3}) {
    CHECK(results.row_losses.to_vector<double>()[row] == 0.0);
    CHECK(results.row_correct.to_vector<uint8_t>()[row] == 0);
    CHECK(results.grad_hidden.narrow(row, row + 1).to_vector<double>() == std::vector<double>(7, 0.0));
  }
  for (const double value : results.grad_weight.to_vector<double>()) REQUIRE(std::isfinite(value));
}

TEST_CASE("linear_cross_entropy: without any target the loss and the gradients are zero") {
  const Tensor weight = random_tensor({29, 7}, 2);
  for (const int64_t rows : {0, 5}) {
    for (const int64_t divisor : {0, 10}) {
      const Results results = run(random_tensor({rows, 7}, 1), weight,
                                  Tensor::full({rows}, ignored_target, DType::i32), {.divisor = divisor});
      CHECK(results.n_targets == 0);
      CHECK(*results.loss.data<double>() == 0.0);
      CHECK(results.row_losses.to_vector<double>() == std::vector<double>(rows, 0.0));
      CHECK(results.grad_hidden.to_vector<double>() == std::vector<double>(rows * 7, 0.0));
      CHECK(results.grad_weight.to_vector<double>() == std::vector<double>(29 * 7, 0.0));
    }
  }
}

TEST_CASE("linear_cross_entropy: the first of several largest logits is the prediction") {
  // Logits (0, 2, 2) in every row.
  const Tensor hidden = Tensor::full({3, 1}, 1.0, DType::f32);
  const Tensor weight = Tensor::from_vector<float>({3, 1}, {0, 2, 2});
  const Tensor targets = Tensor::from_vector<int32_t>({3}, {0, 1, 2});
  for (const Device device : devices()) {
    const Results results = run(hidden.to(device), weight.to(device), targets.to(device));
    CHECK(results.row_correct.to_vector<uint8_t>() == std::vector<uint8_t>{0, 1, 0});
  }
}

TEST_CASE(
    "linear_cross_entropy: large logits do not overflow, and those that are not finite show in the loss") {
  const Tensor targets = Tensor::from_vector<int32_t>({1}, {1});
  const Tensor weight = Tensor::from_vector<float>({3, 1}, {-1, 1, 0.5f});
  for (const Device device : devices()) {
    const auto loss_at = [&](float value) {
      const Tensor hidden = Tensor::from_vector<float>({1, 1}, {value});
      return run(hidden.to(device), weight.to(device), targets.to(device)).loss.to_vector<float>()[0];
    };
    CHECK(loss_at(1e6f) == 0.0f);
    CHECK(loss_at(-1e6f) == 2e6f);
    CHECK_FALSE(std::isfinite(loss_at(std::numeric_limits<float>::infinity())));
    CHECK_FALSE(std::isfinite(loss_at(-std::numeric_limits<float>::infinity())));
    CHECK_FALSE(std::isfinite(loss_at(std::numeric_limits<float>::quiet_NaN())));
  }
}

TEST_CASE("linear_cross_entropy: never holds the logits of all rows") {
  const int64_t rows = 4096, d_model = 8, vocab_size = 20000;
  const Variable hidden = Variable::leaf(random_tensor({rows, d_model}, 1).to(DType::f32));
  const Variable weight = Variable::leaf(random_tensor({vocab_size, d_model}, 2).to(DType::f32));
  const Tensor targets = random_targets({rows}, vocab_size);
  const int64_t all_logits_bytes = rows * vocab_size * 4;
  reset_peak_memory();
  const int64_t before = memory_statistics().bytes_in_use;
  Tape tape;
  tape.backward(linear_cross_entropy(hidden, weight, targets).loss);
  CHECK(memory_statistics().peak_bytes_in_use - before < all_logits_bytes / 8);
}

TEST_CASE("linear_cross_entropy: f32 agrees with f64") {
  const Tensor hidden = random_tensor({100, 33}, 1, 0.2);
  const Tensor weight = random_tensor({5000, 33}, 2);
  const Tensor targets = random_targets({100}, 5000, 7);
  const Results f64 = run(hidden, weight, targets);
  for (const int64_t row_block : {0, 13}) {
    // The logits are sums of 33 products of size 1 and are exponentiated: their absolute error, some 2^-24,
    // becomes relative. 20 times that leaves room for the sums of the gradients.
    const Results f32 = run(hidden.to(DType::f32), weight.to(DType::f32), targets, {.row_block = row_block});
    check_equal(f32, f64, 20 * 6e-8);
  }
}

TEST_CASE("linear_cross_entropy: same bits in every run") {
  const Tensor hidden = random_tensor({500, 33}, 1).to(DType::f32);
  const Tensor weight = random_tensor({300, 33}, 2).to(DType::f32);
  const Tensor targets = random_targets({500}, 300, 7);
  for (const int n_threads : {1, 3}) {
    const WithThreads threads(n_threads);
    const Results first = run(hidden, weight, targets);
    const Results second = run(hidden, weight, targets);
    CHECK(first.loss.to_vector<float>() == second.loss.to_vector<float>());
    CHECK(first.grad_hidden.to_vector<float>() == second.grad_hidden.to_vector<float>());
    CHECK(first.grad_weight.to_vector<float>() == second.grad_weight.to_vector<float>());
  }
}

TEST_CASE("linear_cross_entropy: names what is wrong") {
  const Variable hidden(random_tensor({2, 3, 7}, 1));
  const Variable weight(random_tensor({29, 7}, 2));
  const Tensor targets = random_targets({2, 3}, 29);
  CHECK_THROWS_WITH(linear_cross_entropy(Variable(random_tensor({}, 1)), weight, targets),
                    "linear_cross_entropy: hidden is a scalar; it must be (..., d_model)");
  CHECK_THROWS_WITH(
      linear_cross_entropy(hidden, Variable(random_tensor({29, 6}, 2)), targets),
      "linear_cross_entropy: weight has shape (29, 6); it must be (vocab_size, d_model) with d_model = "
      "7, as in hidden");
  CHECK_THROWS_WITH(linear_cross_entropy(hidden, Variable(weight.value().to(DType::f32)), targets),
                    "linear_cross_entropy: weight is f32; it must be f64 like the other arguments");
  CHECK_THROWS_WITH(linear_cross_entropy(hidden, weight, targets.to(DType::i64)),
                    "linear_cross_entropy: targets are i64; they must be i32");
  CHECK_THROWS_WITH(
      linear_cross_entropy(hidden, weight, random_targets({5}, 29)),
      "linear_cross_entropy: targets have shape (5); hidden has 6 rows, and each needs one target");
  CHECK_THROWS_WITH(linear_cross_entropy(hidden, weight, targets, {.row_block = -1}),
                    "linear_cross_entropy: row_block is -1; it must be >= 0");
  CHECK_THROWS_WITH(linear_cross_entropy(hidden, weight, targets, {.divisor = -2}),
                    "linear_cross_entropy: divisor is -2; it must be >= 0");
  CHECK_THROWS_WITH(
      linear_cross_entropy(hidden, weight, targets, {.divisor_tensor = Tensor::zeros({}, DType::i32)}),
      "linear_cross_entropy: divisor_tensor is i32 () on cpu; it must be i64 () on cpu, and divisor 0");
  targets.data<int32_t>()[4] = 29;
  CHECK_THROWS_WITH(
      linear_cross_entropy(hidden, weight, targets),
      "linear_cross_entropy: the target of row 4 is 29; it must be 0 to 28, or -1 for a row that does "
      "not count");
  targets.data<int32_t>()[4] = -2;
  CHECK_THROWS_WITH(
      linear_cross_entropy(hidden, weight, targets),
      "linear_cross_entropy: the target of row 4 is -2; it must be 0 to 28, or -1 for a row that does "
      "not count");
}
