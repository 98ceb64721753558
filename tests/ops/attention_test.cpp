#include "ops/attention/attention.h"

#include <cmath>

#include "autograd/tape.h"
#include "ops/document_positions/document_positions.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

struct Sizes {
  int64_t batch, n_queries, n_keys, n_heads, n_kv_heads, head_dim;
};

std::vector<Tensor> inputs_of(const Sizes& sizes) {
  const Shape keys{sizes.batch, sizes.n_keys, sizes.n_kv_heads, sizes.head_dim};
  return {random_tensor({sizes.batch, sizes.n_queries, sizes.n_heads, sizes.head_dim}, 1),
          random_tensor(keys, 2), random_tensor(keys, 3)};
}

CheckedFunction with(const Tensor& positions, const AttentionOptions& options) {
  return [=](const std::vector<Variable>& in) {
    return std::vector<Variable>{attention(in[0], in[1], in[2], positions.to(in[0].device()), options)};
  };
}

/// Of the last n_queries steps of sequences with random documents.
Tensor random_positions(const Sizes& sizes, double probability) {
  const Tensor whole = document_positions(random_resets(sizes.batch, sizes.n_keys, probability), {},
                                          sizes.batch, sizes.n_keys, {})
                           .positions;
  return steps_of(whole, sizes.n_keys - sizes.n_queries, sizes.n_keys);
}

/// The definition, one row after another.
Tensor direct(const std::vector<Tensor>& in, const Tensor& positions, const AttentionOptions& options) {
  const int64_t batch = in[0].dim(0), n_queries = in[0].dim(1), n_heads = in[0].dim(2), d = in[0].dim(3);
  const int64_t n_keys = in[1].dim(1), groups = in[1].dim(2);
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(d)));
  const Tensor y = Tensor::zeros(in[0].shape(), DType::f64);
  for (int64_t row = 0; row < batch * n_queries * n_heads; ++row) {
    const int64_t h = row % n_heads, t = row / n_heads % n_queries, b = row / n_heads / n_queries;
    const int64_t own = n_keys - n_queries + t;
    double sum = 0.0;
    for (int64_t s = 0; s <= own; ++s) {
      if (options.window >= 0 && s < own - options.window) continue;
      if (positions.defined() && s < own - positions.data<int32_t>()[b * n_queries + t]) continue;
      const int64_t key = ((b * n_keys + s) * groups + h / (n_heads / groups)) * d;
      double score = 0.0;
      for (int64_t p = 0; p < d; ++p)
        score += in[0].data<double>()[row * d + p] * in[1].data<double>()[key + p];
      const double weight = std::exp(scale * score);
      sum += weight;
      for (int64_t p = 0; p < d; ++p) y.data<double>()[row * d + p] += weight * in[2].data<double>()[key + p];
    }
    for (int64_t p = 0; p < d; ++p) y.data<double>()[row * d + p] /= sum;
  }
  return y;
}

Tensor run(const std::vector<Tensor>& in, const Tensor& positions, const AttentionOptions& options,
           DType dtype = DType::f64) {
  return attention(Variable(in[0].to(dtype)), Variable(in[1].to(dtype)), Variable(in[2].to(dtype)), positions,
                   options)
      .value();
}

/// Sums of some hundred f64 products in another order.
constexpr double reordering = 1e-13;

}  // namespace

TEST_CASE("attention: tiles equal the definition, around the sizes of tiles and registers") {
  for (const int64_t n_queries : {1, 2, 63, 64, 65, 130}) {
    for (const int64_t n_past : {0, 1, 64, 70}) {
      for (const int64_t head_dim : {1, 8, 17}) {
        const Sizes sizes{2, n_queries, n_past + n_queries, 4, 2, head_dim};
        const std::vector<Tensor> in = inputs_of(sizes);
        const Tensor positions = random_positions(sizes, 0.05);
        INFO(n_queries << " queries, " << n_past << " keys before them, head_dim " << head_dim);
        CHECK(relative_error(run(in, {}, {}), direct(in, {}, {})) < reordering);
        CHECK(relative_error(run(in, {}, {.scale = 0.7, .window = 20}),
                             direct(in, {}, {.scale = 0.7, .window = 20})) < reordering);
        CHECK(relative_error(run(in, positions, {}), direct(in, positions, {})) < reordering);
        CHECK(relative_error(run(in, positions, {.window = 9}), direct(in, positions, {.window = 9})) <
              reordering);
        CHECK(relative_error(run(in, {}, {.window = 0}), direct(in, {}, {.window = 0})) < reordering);
      }
    }
  }
}

TEST_CASE("attention: gradient matches finite differences") {
  // A single key: the gradients of q and k are 0 but for rounding, which there is nothing to compare with on a GPU.
  CHECK(check_gradient(with({}, {}), inputs_of({2, 1, 1, 1, 1, 3}), 1e-6, cpu_only) == "");
  for (const Sizes& sizes : {Sizes{2, 7, 7, 4, 2, 5}, Sizes{1, 65, 65, 2, 1, 8}, Sizes{2, 63, 64, 3, 3, 33},
                             Sizes{1, 3, 130, 2, 2, 16}, Sizes{1, 70, 135, 6, 2, 7}}) {
    INFO(sizes.n_queries << " queries, " << sizes.n_keys << " keys, head_dim " << sizes.head_dim);
    CHECK(check_gradient(with({}, {}), inputs_of(sizes)) == "");
    CHECK(check_gradient(with(random_positions(sizes, 0.05), {.scale = 0.3}), inputs_of(sizes)) == "");
    CHECK(check_gradient(with({}, {.window = 11}), inputs_of(sizes)) == "");
    CHECK(check_gradient(with(random_positions(sizes, 0.1), {.window = 66}), inputs_of(sizes)) == "");
  }
}

TEST_CASE("attention: every entry of the Jacobian") {
  const Sizes sizes{2, 4, 5, 2, 1, 3};
  CHECK(check_jacobian(with(random_positions(sizes, 0.3), {.window = 2}), inputs_of(sizes)) == "");
}

TEST_CASE("attention: on a GPU, lengths around a tile, heads around a slice of channels") {
  for (const int64_t head_dim : {15, 64, 80, 129}) {
    for (const int64_t n_queries : {1, 65}) {
      const Sizes sizes{1, n_queries, n_queries + 3, 2, 1, head_dim};
      INFO(n_queries << " queries, head_dim " << head_dim);
      CHECK(check_cuda(with(random_positions(sizes, 0.02), {.window = 50}), inputs_of(sizes)) == "");
      CHECK(check_cuda_bf16(with({}, {}), inputs_of(sizes), {0, 1, 2}) == "");
    }
  }
  for (const int64_t length : {63, 64, 128}) {
    const Sizes sizes{2, length, length, 3, 3, 20};
    INFO("length " << length);
    CHECK(check_cuda(with({}, {}), inputs_of(sizes)) == "");
    CHECK(check_cuda_bf16(with(random_positions(sizes, 0.05), {.window = 70}), inputs_of(sizes), {0, 1, 2}) ==
          "");
  }
}

TEST_CASE("attention: f32 agrees with f64") {
  const Sizes sizes{2, 257, 257, 4, 2, 40};
  const std::vector<Tensor> in = inputs_of(sizes);
  // Scores of some units are rounded to 2^-24 of themselves, weights with them.
  CHECK(relative_error(run(in, {}, {}, DType::f32), run(in, {}, {})) < 20 * 6e-8);
}

TEST_CASE("attention: large scores neither overflow nor lose the sum") {
  std::vector<Tensor> in = inputs_of({1, 70, 70, 1, 1, 4});
  for (int64_t i = 0; i < in[0].numel(); ++i) in[0].data<double>()[i] *= 1000.0;
  const Tensor y = run(in, {}, {}, DType::f32);
  // The largest score is about 3000, rounded to 2^-24 of it: that much of each weight.
  CHECK(relative_error(y, run(in, {}, {})) < 4 * 3000 * 6e-8);
  CHECK(check_cuda(with({}, {}), in, 1e-2) == "");
}

TEST_CASE("attention: the same bits with any number of threads") {
  const Sizes sizes{2, 150, 200, 4, 2, 24};
  const std::vector<Tensor> in = inputs_of(sizes);
  const Tensor positions = random_positions(sizes, 0.02);
  const auto results = [&](int threads) {
    const WithThreads scope(threads);
    Tape tape;
    std::vector<Variable> leaves;
    for (const Tensor& tensor : in) leaves.push_back(Variable::leaf(tensor.to(DType::f32)));
    const Variable y = attention(leaves[0], leaves[1], leaves[2], positions, {.window = 90});
    tape.backward({y}, {random_tensor(y.shape(), 9).to(DType::f32)});
    std::vector<std::vector<float>> bits{y.value().to_vector<float>()};
    for (const Variable& leaf : leaves) bits.push_back(leaf.gradient().tensor().to_vector<float>());
    return bits;
  };
  const auto once = results(1);
  CHECK(results(2) == once);
  CHECK(results(5) == once);
}

TEST_CASE("attention: queries at the end of the keys are the whole's last rows") {
  const Sizes sizes{2, 8, 8, 2, 1, 5};
  const std::vector<Tensor> in = inputs_of(sizes);
  const Tensor whole = run(in, {}, {}), last = run({steps_of(in[0], 5, 8), in[1], in[2]}, {}, {});
  CHECK(relative_error(last, steps_of(whole, 5, 8)) < reordering);
}

TEST_CASE("attention: a packed row equals its documents one by one") {
  const std::vector<int64_t> starts{0, 1, 70, 71, 140, 150};
  const Sizes sizes{1, 150, 150, 4, 2, 6};
  const std::vector<Tensor> in = inputs_of(sizes);
  const Tensor positions = Tensor::empty({1, sizes.n_queries}, DType::i32);
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    for (int64_t t = starts[i]; t < starts[i + 1]; ++t)
      positions.data<int32_t>()[t] = static_cast<int32_t>(t - starts[i]);
  }
  const Tensor cotangent = random_tensor(in[0].shape(), 9);
  const auto evaluate = [&](int64_t begin, int64_t end, const Tensor& row_positions) {
    Tape tape;
    std::vector<Variable> leaves;
    for (const Tensor& tensor : in) leaves.push_back(Variable::leaf(steps_of(tensor, begin, end)));
    const Variable y = attention(leaves[0], leaves[1], leaves[2], row_positions);
    tape.backward({y}, {steps_of(cotangent, begin, end)});
    std::vector<Tensor> results{y.value()};
    for (const Variable& leaf : leaves) results.push_back(leaf.gradient().tensor());
    return results;
  };
  const std::vector<Tensor> packed = evaluate(0, sizes.n_queries, positions);
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    const std::vector<Tensor> alone = evaluate(starts[i], starts[i + 1], {});
    for (size_t r = 0; r < alone.size(); ++r) {
      INFO("document " << i << ", result " << r);
      CHECK(relative_error(steps_of(packed[r], starts[i], starts[i + 1]), alone[r]) < reordering);
    }
  }
}

TEST_CASE("attention: names what is wrong") {
  const Variable q(random_tensor({2, 3, 4, 5}, 1)), k(random_tensor({2, 3, 2, 5}, 2));
  const auto error = [&](const Variable& queries, const Variable& keys, const Variable& values,
                         const Tensor& positions = {}, const AttentionOptions& options = {}) {
    return input_error_of([&] { attention(queries, keys, values, positions, options); });
  };
  const auto of_shape = [](const Shape& shape) { return Variable(random_tensor(shape, 3)); };
  CHECK(error(q, k, k) == "(no error)");
  CHECK(error(of_shape({2, 3, 4}), k, k) ==
        "attention: q has shape (2, 3, 4); it must be (batch, n_queries, n_heads, head_dim)");
  CHECK(error(of_shape({2, 0, 4, 5}), k, k) ==
        "attention: q has shape (2, 0, 4, 5); there must be a query, a head and a channel");
  CHECK(error(q, of_shape({2, 3, 2, 6}), k) ==
        "attention: k has shape (2, 3, 2, 6); it must be (batch, n_keys, n_kv_heads, head_dim) with batch = "
        "2 and "
        "head_dim = 5");
  CHECK(error(q, of_shape({2, 2, 2, 5}), k) ==
        "attention: k has 2 steps; they must end with those of the 3 queries");
  CHECK(error(q, of_shape({2, 3, 3, 5}), k) == "attention: n_kv_heads is 3; it must divide n_heads = 4");
  CHECK(error(q, k, q) == "attention: v has shape (2, 3, 4, 5); it must be the shape of k = (2, 3, 2, 5)");
  CHECK(error(q, k, Variable(k.value().to(DType::f32))) ==
        "attention: v is f32; it must be f64 like the other arguments");
  CHECK(error(q, k, k, Tensor::zeros({2, 4}, DType::i32)) ==
        "attention: positions is i32 (2, 4); it must be i32 (batch, n_queries) = (2, 3)");
  CHECK(error(q, k, k, {}, {.window = -2}) == "attention: window is -2; it must be -1 (no limit) or more");
}
