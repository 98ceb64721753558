#include "ops/chunked_matrix_state/chunked_matrix_state.h"

#include "autograd/tape.h"
#include "core/parallel.h"
#if defined(HEADWATER_EMULATED)
#include "core/cuda/emulator/emulator.h"
#endif
#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"

using namespace headwater;

namespace {

enum class Decay { none, constant, per_step };

struct Case {
  int64_t batch, length, n_groups, n_heads, d_key, d_value;
  Decay decay = Decay::per_step;
  double decay_scale = 1.0;  // log decays are -decay_scale * |normal|
  bool with_resets = false;
};

Tensor negative(const Tensor& tensor, double scale) {
  for (int64_t i = 0; i < tensor.numel(); ++i)
    tensor.data<double>()[i] = -scale * std::abs(tensor.data<double>()[i]);
  return tensor;
}

/// q, k, v, log_decay, value_scale, skip, initial_state; log_decay undefined without decay.
std::vector<Tensor> inputs_of(const Case& c) {
  Tensor log_decay;
  if (c.decay == Decay::constant) log_decay = negative(random_tensor({c.n_heads}, 4), c.decay_scale);
  if (c.decay == Decay::per_step) {
    log_decay = negative(random_tensor({c.batch, c.length, c.n_heads}, 4), c.decay_scale);
  }
  return {random_tensor({c.batch, c.length, c.n_groups, c.d_key}, 1),
          random_tensor({c.batch, c.length, c.n_groups, c.d_key}, 2),
          random_tensor({c.batch, c.length, c.n_heads, c.d_value}, 3),
          log_decay,
          random_tensor({c.batch, c.length, c.n_heads}, 5),
          random_tensor({c.n_heads, c.d_value}, 6),
          random_tensor({c.batch, c.n_heads, c.d_key, c.d_value}, 7)};
}

MatrixStateInputs as_inputs(const std::vector<Variable>& in, const Tensor& resets) {
  return {in[0], in[1], in[2], in[3], in[4], in[5], in[6], resets};
}

CheckedFunction with(const Tensor& resets, const MatrixStateOptions& options) {
  return [=](const std::vector<Variable>& in) {
    const MatrixStateOutput out = chunked_matrix_state(as_inputs(in, resets.to(in[0].device())), options);
    return std::vector<Variable>{out.y, out.final_state};
  };
}

constexpr MatrixStateOptions recurrent{.chunk_len = 64, .form = MatrixStateForm::recurrent};
MatrixStateOptions chunked(int64_t chunk_len) {
  return {.chunk_len = chunk_len, .form = MatrixStateForm::chunked};
}

struct Results {
  std::vector<Tensor> outputs, gradients;
};

Results run(const std::vector<Tensor>& inputs, const Tensor& resets, const MatrixStateOptions& options) {
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) leaves.push_back(input.defined() ? Variable::leaf(input) : Variable());
  Tape tape;
  const std::vector<Variable> outputs = with(resets, options)(leaves);
  Results results;
  std::vector<Tensor> cotangents;
  for (size_t i = 0; i < outputs.size(); ++i) {
    results.outputs.push_back(outputs[i].value());
    cotangents.push_back(
        random_tensor(outputs[i].shape(), 50 + i).to(outputs[i].dtype()).to(outputs[i].device()));
  }
  tape.backward(outputs, cotangents);
  for (const Variable& leaf : leaves)
    results.gradients.push_back(leaf.defined() ? leaf.gradient().tensor() : Tensor());
  return results;
}

Results run(const std::vector<Tensor>& inputs, DType dtype, const Tensor& resets,
            const MatrixStateOptions& options) {
  std::vector<Tensor> converted;
  for (const Tensor& input : inputs) converted.push_back(input.defined() ? input.to(dtype) : Tensor());
  return run(converted, resets, options);
}

double worst_error(const Results& a, const Results& b) {
  double worst = 0.0;
  for (size_t i = 0; i < a.outputs.size(); ++i)
    worst = std::max(worst, relative_error(a.outputs[i], b.outputs[i]));
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    if (a.gradients[i].defined()) worst = std::max(worst, relative_error(a.gradients[i], b.gradients[i]));
  }
  return worst;
}

}  // namespace

TEST_CASE("chunked_matrix_state: gradient matches finite differences at odd sizes") {
  for (const Case& c :
       {Case{1, 1, 1, 1, 1, 1}, Case{2, 7, 1, 2, 3, 5}, Case{1, 100, 2, 4, 7, 9}, Case{1, 257, 1, 3, 4, 6},
        Case{2, 33, 3, 3, 8, 2, Decay::none}, Case{2, 33, 1, 2, 5, 17, Decay::constant, 0.3, true}}) {
    INFO("length " << c.length << ", d_key " << c.d_key << ", d_value " << c.d_value);
    const Tensor resets = c.with_resets ? random_resets(c.batch, c.length, 0.2) : Tensor();
    CHECK(check_gradient(with(resets, chunked(16)), inputs_of(c)) == "");
    CHECK(check_gradient(with(resets, recurrent), inputs_of(c)) == "");
  }
}

TEST_CASE("chunked_matrix_state: every entry of the Jacobian") {
  const Case c{1, 5, 1, 2, 2, 3, Decay::per_step, 0.5, true};
  const Tensor resets = Tensor::from_vector<int32_t>({1, 5}, {0, 0, 1, 0, 0});
  CHECK(check_jacobian(with(resets, chunked(2)), inputs_of(c)) == "");
  CHECK(check_jacobian(with({}, chunked(3)), inputs_of(c)) == "");
}

TEST_CASE("chunked_matrix_state: any chunk length equals the recurrence, outputs and gradients") {
  for (const double decay_scale : {1e-4, 1.0, 100.0}) {
    for (const bool with_resets : {false, true}) {
      const Case c{2, 100, 2, 4, 9, 18, Decay::per_step, decay_scale};
      const Tensor resets = with_resets ? random_resets(2, 100, 0.1) : Tensor();
      const std::vector<Tensor> inputs = inputs_of(c);
      const Results expected = run(inputs, DType::f64, resets, recurrent);
      for (const int64_t chunk_len : {1, 2, 16, 63, 64, 99, 100, 1000}) {
        INFO("decay " << decay_scale << ", resets " << with_resets << ", chunk_len " << chunk_len);
        // The recurrence finds the decay's gradient as a difference of sums: a few digits of f64 are lost
        // there.
        CHECK(worst_error(run(inputs, DType::f64, resets, chunked(chunk_len)), expected) < 1e-11);
      }
    }
  }
}

TEST_CASE("chunked_matrix_state: f32 agrees with f64 for weak and strong decays") {
  for (const double decay_scale : {1e-4, 0.1, 100.0}) {
    const Case c{1, 300, 1, 2, 33, 20, Decay::per_step, decay_scale};
    const std::vector<Tensor> inputs = inputs_of(c);
    const Results exact = run(inputs, DType::f64, {}, recurrent);
    INFO("decay " << decay_scale);
    // Sums of a few thousand products: sqrt(1e4) units of 2^-24.
    CHECK(worst_error(run(inputs, DType::f32, {}, chunked(64)), exact) < 100 * 6e-8);
    CHECK(worst_error(run(inputs, DType::f32, {}, recurrent), exact) < 100 * 6e-8);
  }
}

TEST_CASE("chunked_matrix_state: a sequence in two pieces equals the whole, gradients too") {
  const Case c{2, 50, 1, 2, 6, 7, Decay::per_step, 0.5};
  const std::vector<Tensor> inputs = inputs_of(c);
  const Tensor resets = random_resets(2, 50, 0.05);
  const CheckedFunction whole = with(resets, chunked(16));
  for (const int64_t cut : {1, 15, 16, 17, 49}) {
    // Only sequence inputs are cut; the gradient of the initial state must flow through both pieces.
    const Variable initial_whole = Variable::leaf(inputs[6]), initial_pieces = Variable::leaf(inputs[6]);
    std::vector<Variable> constants;
    for (const Tensor& input : inputs) constants.emplace_back(input);
    constants[6] = initial_whole;
    const Tensor cotangent = random_tensor(inputs[6].shape(), 99);
    Tensor y_whole, final_whole;
    {
      Tape tape;
      const std::vector<Variable> out = whole(constants);
      y_whole = out[0].value();
      final_whole = out[1].value();
      tape.backward({out[1]}, {cotangent});
    }
    const auto piece = [&](int64_t begin, int64_t end, const Variable& state) {
      std::vector<Variable> in = constants;
      for (const int i : {0, 1, 2, 3, 4}) in[i] = Variable(steps_of(inputs[i], begin, end));
      in[6] = state;
      return chunked_matrix_state(as_inputs(in, steps_of(resets, begin, end)), chunked(16));
    };
    Tape tape;
    const MatrixStateOutput first = piece(0, cut, initial_pieces);
    const MatrixStateOutput second = piece(cut, 50, first.final_state);
    CHECK(relative_error(first.y.value(), steps_of(y_whole, 0, cut)) < 1e-13);
    CHECK(relative_error(second.y.value(), steps_of(y_whole, cut, 50)) < 1e-13);
    CHECK(relative_error(second.final_state.value(), final_whole) < 1e-13);
    tape.backward({second.final_state}, {cotangent});
    CHECK(relative_error(initial_pieces.gradient().tensor(), initial_whole.gradient().tensor()) < 1e-13);
  }
}

TEST_CASE("chunked_matrix_state: a packed row equals its documents one by one") {
  const Case c{1, 40, 1, 2, 5, 6, Decay::per_step, 0.2};
  std::vector<Tensor> inputs = inputs_of(c);
  inputs[6] = Tensor();
  const Tensor resets = Tensor::zeros({1, 40}, DType::i32);
  for (const int64_t start : {0, 7, 8, 31}) resets.data<int32_t>()[start] = 1;
  const auto forward = [&](int64_t begin, int64_t end, const Tensor& row_resets) {
    std::vector<Variable> in;
    for (size_t i = 0; i < inputs.size(); ++i) {
      in.emplace_back(i <= 4 ? steps_of(inputs[i], begin, end) : inputs[i]);
    }
    return chunked_matrix_state(as_inputs(in, row_resets), chunked(16)).y.value();
  };
  const Tensor packed = forward(0, 40, resets);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 7}, {7, 8}, {8, 31}, {31, 40}}) {
    CHECK(relative_error(forward(begin, end, {}), steps_of(packed, begin, end)) < 1e-13);
  }
}

TEST_CASE("chunked_matrix_state: bits do not depend on the number of threads") {
  const std::vector<Tensor> inputs = inputs_of({2, 70, 1, 6, 16, 16});
  const int before = n_threads();
  set_n_threads(1);
  const Results one = run(inputs, DType::f32, {}, chunked(32));
  set_n_threads(3);
  const Results three = run(inputs, DType::f32, {}, chunked(32));
  set_n_threads(before);
  CHECK(worst_error(one, three) == 0.0);
}

// ---- on a GPU, or its emulation. check_gradient above runs there too; these are the borders of its kernels' tiles.

namespace {

/// Which inputs of inputs_of may be bf16.
const std::vector<size_t> sequences{0, 1, 2};

Tensor resets_at(int64_t batch, int64_t length, const std::vector<int64_t>& starts) {
  const Tensor resets = Tensor::zeros({batch, length}, DType::i32);
  for (const int64_t start : starts) {
    if (start < length) resets.data<int32_t>()[(batch - 1) * length + start] = 1;
  }
  return resets;
}

}  // namespace

TEST_CASE("chunked_matrix_state on a GPU: lengths around a tile, resets on its borders") {
  for (const int64_t length : {15, 16, 17, 63, 64, 65, 129}) {
    const Case c{2, length, 1, 2, 20, 10, Decay::per_step, 0.3};
    INFO("length " << length);
    CHECK(check_cuda(with({}, chunked(64)), inputs_of(c)) == "");
    const Tensor resets = resets_at(2, length, {0, 15, 16, 63, 64, 65, 128});
    CHECK(check_cuda(with(resets, chunked(64)), inputs_of(c)) == "");
    CHECK(check_cuda_bf16(with(resets, chunked(64)), inputs_of(c), sequences) == "");
  }
}

TEST_CASE("chunked_matrix_state on a GPU: any chunk length") {
  const Case c{1, 100, 2, 4, 8, 8, Decay::per_step, 0.5};
  const Tensor resets = random_resets(1, 100, 0.05);
  for (const int64_t chunk_len : {1, 2, 16, 31, 64, 100}) {
    INFO("chunk_len " << chunk_len);
    CHECK(check_cuda(with(resets, chunked(chunk_len)), inputs_of(c)) == "");
    CHECK(check_cuda_bf16(with(resets, chunked(chunk_len)), inputs_of(c), sequences) == "");
  }
}

TEST_CASE("chunked_matrix_state on a GPU: more channels than a tile has") {
  for (const auto& [d_key, d_value] : {std::pair<int64_t, int64_t>{150, 70}, {64, 128}, {129, 8}, {3, 130}}) {
    const Case c{1, 70, 1, 2, d_key, d_value, Decay::per_step, 0.2};
    INFO("d_key " << d_key << ", d_value " << d_value);
    CHECK(check_cuda(with({}, chunked(64)), inputs_of(c)) == "");
    CHECK(check_cuda_bf16(with({}, chunked(64)), inputs_of(c), sequences) == "");
    CHECK(check_cuda_bf16(with({}, recurrent), inputs_of(c), sequences) == "");
  }
}

TEST_CASE("chunked_matrix_state on a GPU: shorter tiles, then the recurrence, where shared memory ends") {
  for (const int64_t d_key : {400, 700, 1500}) {
    const Case c{1, 40, 1, 1, d_key, 5, Decay::per_step, 0.2};
    INFO("d_key " << d_key);
    CHECK(check_cuda(with({}, chunked(64)), inputs_of(c)) == "");
  }
}

TEST_CASE("chunked_matrix_state on a GPU: strong decays beside weak ones") {
  // The decay's gradient is judged against its largest entry; outputs too.
  const Case c{1, 130, 1, 2, 16, 16, Decay::per_step, 100.0};
  std::vector<Tensor> inputs = inputs_of(c);
  for (int64_t i = 0; i < inputs[3].numel(); i += 3) inputs[3].data<double>()[i] = -1e-4;
  CHECK(check_cuda(with({}, chunked(64)), inputs) == "");
  CHECK(check_cuda(with({}, recurrent), inputs) == "");
}

TEST_CASE(
    "chunked_matrix_state on a GPU: each kind of decay and skip, inputs left out, either output alone") {
  for (const Decay decay : {Decay::none, Decay::constant, Decay::per_step}) {
    for (const bool recurrent_form : {false, true}) {
      const Case c{2, 70, 3, 6, 5, 7, decay, 0.2};
      const MatrixStateOptions options = recurrent_form ? recurrent : chunked(64);
      std::vector<Tensor> inputs = inputs_of(c);
      INFO("decay " << static_cast<int>(decay) << ", recurrent " << recurrent_form);
      CHECK(check_cuda(with({}, options), inputs) == "");
      inputs[5] = random_tensor({6}, 6);
      inputs[6] = Tensor();
      CHECK(check_cuda(with(random_resets(2, 70, 0.02), options), inputs) == "");
      inputs[4] = inputs[5] = Tensor();
      CHECK(check_cuda(with({}, options), inputs) == "");
      inputs = inputs_of(c);
      for (const int output : {0, 1}) {
        const CheckedFunction one = [&](const std::vector<Variable>& in) {
          return std::vector<Variable>{with({}, options)(in)[output]};
        };
        CHECK(check_cuda(one, inputs) == "");
      }
    }
  }
}

TEST_CASE("chunked_matrix_state on a GPU: a group's heads in two parts, of two heads and of one") {
  const Case c{1, 512, 1, 3, 2, 2, Decay::per_step, 0.1};
  CHECK(check_cuda(with({}, chunked(1)), inputs_of(c)) == "");
}

TEST_CASE("chunked_matrix_state on a GPU: decoding") {
  for (const int64_t length : {1, 3}) {
    const Case c{3, length, 1, 4, 40, 36, Decay::per_step, 0.5};
    CHECK(check_cuda_bf16(with({}, recurrent), inputs_of(c), sequences) == "");
  }
}

TEST_CASE("chunked_matrix_state: bf16 keeps states and decays in f32") {
  std::vector<Variable> in;
  for (const Tensor& input : inputs_of({1, 5, 1, 2, 3, 4})) in.emplace_back(input.to(DType::bf16));
  CHECK_THROWS_WITH(chunked_matrix_state(as_inputs(in, {})),
                    "chunked_matrix_state: log_decay is bf16; beside bf16 arguments it must be f32");
}

#if defined(HEADWATER_EMULATED)
TEST_CASE("chunked_matrix_state on a GPU: the same bits in whatever order threads and blocks run") {
  const Case c{2, 100, 1, 4, 20, 12, Decay::per_step, 0.3};
  const std::vector<Tensor> inputs = inputs_of(c);
  for (const MatrixStateOptions& options : {chunked(64), chunked(16), recurrent}) {
    const auto with_seed = [&](uint64_t seed) {
      emulator::set_seed(seed);
      std::vector<Tensor> on_gpu;
      for (size_t i = 0; i < inputs.size(); ++i) {
        on_gpu.push_back(inputs[i].to(i < 3 ? DType::bf16 : DType::f32).to(parse_device("cuda")));
      }
      return run(on_gpu, resets_at(2, 100, {64, 70}), options);
    };
    CHECK(worst_error(with_seed(1), with_seed(2)) == 0.0);
  }
}
#endif

TEST_CASE("chunked_matrix_state: names what is wrong") {
  std::vector<Variable> in;
  for (const Tensor& input : inputs_of({2, 5, 2, 4, 3, 6})) in.emplace_back(input);
  const auto call = [&](size_t index, const Tensor& replacement) {
    std::vector<Variable> changed = in;
    changed[index] = Variable(replacement);
    return chunked_matrix_state(as_inputs(changed, {}));
  };
  CHECK_THROWS_WITH(
      call(1, random_tensor({2, 5, 2, 4}, 1)),
      "chunked_matrix_state: k has shape (2, 5, 2, 4); it must be (batch, length, n_groups, d_key) = "
      "(2, 5, 2, 3)");
  CHECK_THROWS_WITH(
      call(2, random_tensor({2, 5, 3, 6}, 1)),
      "chunked_matrix_state: 3 heads cannot share 2 groups; n_heads must be a multiple of n_groups");
  CHECK_THROWS_WITH(
      call(3, random_tensor({2, 5, 3}, 1)),
      "chunked_matrix_state: log_decay has shape (2, 5, 3); it must be (n_heads) or (batch, length, "
      "n_heads) = (2, 5, 4)");
  CHECK_THROWS_WITH(
      call(6, random_tensor({2, 4, 6, 3}, 1)),
      "chunked_matrix_state: initial_state has shape (2, 4, 6, 3); it must be (batch, n_heads, d_key, "
      "d_value) = (2, 4, 3, 6)");
}
