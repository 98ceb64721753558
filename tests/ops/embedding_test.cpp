#include "ops/embedding/embedding.h"

#include <cmath>

#include "autograd/tape.h"
#include "core/random.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

/// Tokens below `vocab_size`, most of them more than once.
Tensor random_tokens(const Shape& shape, int64_t vocab_size) {
  RandomStream random(1, "tokens");
  const Tensor tokens = Tensor::empty(shape, DType::i32);
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    tokens.data<int32_t>()[i] = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab_size)));
  }
  return tokens;
}

CheckedFunction of_tokens(const Tensor& tokens) {
  return [tokens](const std::vector<Variable>& inputs) {
    return std::vector<Variable>{embedding(tokens.to(inputs[0].device()), inputs[0])};
  };
}

/// Gradient of a bf16 or f32 weight on the GPU, added to `before` where that is defined.
Tensor gradient_on_gpu(const Tensor& tokens, const Tensor& weight, const Tensor& grad_y,
                       const Tensor& before = {}) {
  const Device gpu = parse_device("cuda");
  const Variable leaf = before.defined() ? Variable::parameter(weight.to(gpu), before.to(gpu).clone())
                                         : Variable::leaf(weight.to(gpu));
  Tape tape;
  const Variable y = embedding(tokens.to(gpu), leaf, {.output_dtype = grad_y.dtype()});
  tape.backward({y}, {grad_y.to(gpu)});
  return leaf.gradient().tensor().to(Device{});
}

/// The gradient of the weight, written plainly, added to `gradient`.
void add_rows(const Tensor& tokens, const Tensor& grad_y, const Tensor& gradient) {
  const int64_t d_model = gradient.dim(1);
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    for (int64_t j = 0; j < d_model; ++j) {
      gradient.data<double>()[tokens.data<int32_t>()[i] * d_model + j] +=
          grad_y.data<double>()[i * d_model + j];
    }
  }
}

}  // namespace

TEST_CASE("embedding: gradient matches finite differences at odd sizes") {
  for (const int64_t length : {1, 7, 100, 257}) {
    for (const int64_t d_model : {1, 7, 33}) {
      INFO("length " << length << ", d_model " << d_model);
      const int64_t vocab_size = 11;
      CHECK(check_gradient(of_tokens(random_tokens({2, length}, vocab_size)),
                           {random_tensor({vocab_size, d_model}, 1)}) == "");
    }
  }
}

TEST_CASE("embedding: on a GPU, weight and output each in f32 or bf16") {
  const auto to_bf16 = [](const std::vector<Variable>& in) {
    const Device device = in[0].device();
    return std::vector<Variable>{embedding(random_tokens({3, 20}, 11).to(device), in[0],
                                           {.output_dtype = device.is_cpu() ? DType::f64 : DType::bf16})};
  };
  const auto to_f32 = [](const std::vector<Variable>& in) {
    const Device device = in[0].device();
    return std::vector<Variable>{embedding(random_tokens({3, 20}, 11).to(device), in[0],
                                           {.output_dtype = device.is_cpu() ? DType::f64 : DType::f32})};
  };
  for (const int64_t d_model : {1, 4, 8, 9, 124, 128, 132, 264}) {
    INFO("d_model " << d_model);
    const std::vector<Tensor> weight{random_tensor({11, d_model}, 1)};
    CHECK(check_cuda(of_tokens(random_tokens({3, 20}, 11)), weight) == "");
    CHECK(check_cuda_bf16(to_bf16, weight, {0}) == "");
    CHECK(check_cuda_bf16(to_f32, weight, {0}, 1e-6) == "");  // nothing is rounded
    CHECK(check_cuda_bf16(to_bf16, weight, {}, 4e-3) == "");
  }
}

TEST_CASE(
    "embedding: on a GPU the gradient is added in the order of the positions, whatever the vocabulary") {
  if (!has_cuda()) return;
  const int64_t d_model = 12;
  for (const int64_t vocab_size : {1, 3, 4, 50, 1000}) {
    for (const int64_t n_tokens : {0, 1, 64, 65, 512, 1100}) {
      INFO("vocabulary of " << vocab_size << ", " << n_tokens << " tokens");
      const Tensor tokens = random_tokens({n_tokens}, vocab_size);
      const Tensor weight = random_tensor({vocab_size, d_model}, 1).to(DType::bf16);
      const Tensor grad_y = random_tensor({n_tokens, d_model}, 2).to(DType::f32);
      const Tensor before = random_tensor({vocab_size, d_model}, 3).to(DType::f32);
      const Tensor fresh = Tensor::zeros({vocab_size, d_model}, DType::f64), added = before.to(DType::f64);
      add_rows(tokens, grad_y.to(DType::f64), fresh);
      add_rows(tokens, grad_y.to(DType::f64), added);
      // At most 1100 additions to a row, whose roundings average out.
      CHECK(relative_error(gradient_on_gpu(tokens, weight, grad_y), fresh) < 20 * 6e-8);
      CHECK(relative_error(gradient_on_gpu(tokens, weight, grad_y, before), added) < 20 * 6e-8);
      if (n_tokens > 8 * vocab_size) continue;
      // With one running sum, the CPU's bits in f32.
      const Variable leaf = Variable::leaf(weight.to(DType::f32));
      Tape tape;
      const Variable y = embedding(tokens, leaf);
      tape.backward({y}, {grad_y});
      CHECK(gradient_on_gpu(tokens, weight, grad_y).to_vector<float>() ==
            leaf.gradient().tensor().to_vector<float>());
    }
  }
}

TEST_CASE("embedding: a token outside the vocabulary gives NaN and no gradient on a GPU") {
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  const Tensor tokens = Tensor::from_vector<int32_t>({4}, {1, -1, 3, 0});
  const Variable weight = Variable::leaf(Tensor::from_vector<float>({3, 1}, {10, 11, 12}).to(gpu));
  Tape tape;
  const Variable y = embedding(tokens.to(gpu), weight);
  tape.backward({y}, {Tensor::from_vector<float>({4, 1}, {1, 2, 3, 4}).to(gpu)});
  const std::vector<float> values = y.value().to_vector<float>();
  CHECK(values[0] == 11);
  CHECK(std::isnan(values[1]));
  CHECK(std::isnan(values[2]));
  CHECK(values[3] == 10);
  CHECK(weight.gradient().tensor().to_vector<float>() == std::vector<float>{4, 1, 0});
}

TEST_CASE("embedding: every entry of the Jacobian") {
  CHECK(check_jacobian(of_tokens(random_tokens({2, 3}, 4)), {random_tensor({4, 2}, 1)}) == "");
}

TEST_CASE("embedding: copies the rows, for tokens of any shape") {
  const Variable weight(Tensor::from_vector<float>({3, 2}, {0, 1, 10, 11, 20, 21}));
  const Variable y = embedding(Tensor::from_vector<int32_t>({1, 4}, {2, 0, 0, 1}), weight);
  CHECK(y.shape() == Shape{1, 4, 2});
  CHECK(y.value().to_vector<float>() == std::vector<float>{20, 21, 0, 1, 0, 1, 10, 11});
  CHECK(embedding(Tensor::from_vector<int32_t>({1}, {1}), weight).shape() == Shape{1, 2});
  CHECK(embedding(Tensor::zeros({2, 0}, DType::i32), weight).shape() == Shape{2, 0, 2});
}

TEST_CASE("embedding: adds to a parameter's gradient, and fills a fresh one") {
  const int64_t vocab_size = 50, d_model = 70;
  const Tensor tokens = random_tokens({4, 25}, vocab_size);
  const Tensor grad_y = random_tensor({4, 25, d_model}, 3);
  const Tensor before = random_tensor({vocab_size, d_model}, 2);
  const Variable parameter = Variable::parameter(random_tensor({vocab_size, d_model}, 1), before.clone());
  const Variable leaf = Variable::leaf(parameter.value());
  Tape tape;
  const Variable y = embedding(tokens, parameter);
  const Variable z = embedding(tokens, leaf);
  tape.backward({y, z}, {grad_y, grad_y});
  const Tensor fresh = Tensor::zeros({vocab_size, d_model}, DType::f64);
  add_rows(tokens, grad_y, before);
  add_rows(tokens, grad_y, fresh);
  CHECK(parameter.gradient().tensor().to_vector<double>() == before.to_vector<double>());
  CHECK(leaf.gradient().tensor().to_vector<double>() == fresh.to_vector<double>());
}

TEST_CASE("embedding: the bits do not depend on the number of threads") {
  const Tensor tokens = random_tokens({2, 500}, 30);
  const Tensor weight = random_tensor({30, 100}, 1).to(DType::f32);
  const Tensor grad_y = random_tensor({2, 500, 100}, 2).to(DType::f32);
  const auto gradient = [&](int n_threads) {
    const WithThreads threads(n_threads);
    const Variable leaf = Variable::leaf(weight);
    Tape tape;
    const Variable y = embedding(tokens, leaf);
    tape.backward({y}, {grad_y});
    return leaf.gradient().tensor().to_vector<float>();
  };
  CHECK(gradient(1) == gradient(3));
}

TEST_CASE("embedding: f32 agrees with f64") {
  const Tensor tokens = random_tokens({2, 100}, 10);
  const Tensor grad_y = random_tensor({2, 100, 33}, 2);
  const auto gradient = [&](DType dtype) {
    const Variable leaf = Variable::leaf(random_tensor({10, 33}, 1).to(dtype));
    Tape tape;
    const Variable y = embedding(tokens, leaf);
    tape.backward({y}, {grad_y.to(dtype)});
    return leaf.gradient().tensor();
  };
  // About 20 additions to each row, each rounded to 2^-24.
  CHECK(relative_error(gradient(DType::f32), gradient(DType::f64)) < 20 * 6e-8);
}

TEST_CASE("embedding: names what is wrong") {
  const Variable weight(random_tensor({11, 3}, 1));
  const Tensor tokens = random_tokens({2, 3}, 11);
  tokens.data<int32_t>()[5] = 11;
  CHECK_THROWS_WITH(embedding(tokens, weight),
                    "embedding: the token at position (1, 2) is 11; the vocabulary has 11 tokens, 0 to 10");
  tokens.data<int32_t>()[1] = -1;
  CHECK_THROWS_WITH(embedding(tokens, weight),
                    "embedding: the token at position (0, 1) is -1; the vocabulary has 11 tokens, 0 to 10");
  CHECK_THROWS_WITH(embedding(random_tokens({2, 3}, 11), weight, {.output_dtype = DType::f32}),
                    "embedding: output_dtype is f32, weight f64; on the CPU they must be the same");
  CHECK_THROWS_WITH(embedding(Tensor::zeros({2, 3}, DType::i64), weight),
                    "embedding: tokens are i64; they must be i32");
  CHECK_THROWS_WITH(embedding(Tensor::zeros({2, 3}, DType::i32), Variable(random_tensor({11}, 1))),
                    "embedding: weight has shape (11); it must be (vocab_size, d_model)");
}
