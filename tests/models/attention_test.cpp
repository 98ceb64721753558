#include "models/mixers/attention.h"

#include <cmath>

#include "autograd/tape.h"
#include "tests/bound_parameters.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"

using namespace headwater;

namespace {

constexpr int64_t d_model = 6;

/// Two heads of 3 channels.
AttentionConfig small_config() {
  AttentionConfig config;
  config.n_heads = 2;
  return config;
}

struct NamedConfig {
  std::string name;
  AttentionConfig config;
};

/// Every option away from its default at least once.
std::vector<NamedConfig> option_sets() {
  std::vector<NamedConfig> sets{{"defaults", small_config()}};
  const auto add = [&](const std::string& name, const std::function<void(AttentionConfig&)>& change) {
    sets.push_back({name, small_config()});
    change(sets.back().config);
  };
  add("grouped heads, rotary halves", [](AttentionConfig& config) {
    config.n_heads = 4;
    config.n_kv_heads = 2;
    config.head_dim = 5;
    config.rotary_dim = 4;
  });
  add("interleaved rotary, biases, scale", [](AttentionConfig& config) {
    config.head_dim = 4;
    config.rotary_dim = 4;
    config.rotary_base = 50.0;
    config.rotary_interleaved = true;
    config.qkv_proj_bias = true;
    config.out_proj_bias = true;
    config.softmax_scale = 0.8;
  });
  add("convolution, window", [](AttentionConfig& config) {
    config.n_kv_heads = 1;
    config.d_conv = 3;
    config.window_size = 5;
    config.rotary_dim = 2;
  });
  add("no step but its own", [](AttentionConfig& config) {
    config.window_size = 0;
    config.d_conv = 2;
  });
  return sets;
}

/// A mixer whose parameters are all random: none is 0 or 1, where mistakes hide.
struct TestMixer {
  explicit TestMixer(const AttentionConfig& config, DType dtype = DType::f64)
      : mixer(config.make(d_model, 2)) {
    mixer->declare_parameters(ParameterScope(store, ""));
    store.allocate(dtype);
    store.initialize(11);
    for (const Parameter& parameter : store.parameters()) {
      // Larger than the initial values, so that the weights of the softmax differ.
      add_in_place(parameter.value, random_tensor(parameter.shape, stream_id(parameter.name), 0.5).to(dtype));
    }
  }

  std::unique_ptr<Mixer> mixer;
  ParameterStore store;
};

struct Run {
  Tensor y, grad_x;
  std::vector<Tensor> state, grad_parameters;
};

/// The parts of a state that gradients flow through: all but the count of steps.
bool is_real(const Variable& part) {
  return part.dtype() != DType::i32;
}

Tensor joined(const std::vector<Tensor>& parts, const Shape& shape) {
  const Tensor whole = Tensor::empty(shape, parts[0].dtype());
  const int64_t width = shape[2];
  for (int64_t b = 0; b < shape[0]; ++b) {
    int64_t t = b * shape[1];
    for (const Tensor& part : parts) {
      const int64_t count = part.dim(1) * width;
      whole.view(t * width, {count}).copy_from(part.view(b * count, {count}));
      t += part.dim(1);
    }
  }
  return whole;
}

/// Forward and backward, the sequence cut at `borders` (which begin with 0 and end with the length), the state
/// handed over in between.
Run run_pieces(const AttentionConfig& config, const Tensor& x, const Tensor& resets,
               const std::vector<int64_t>& borders, bool with_state_cotangent = true) {
  const TestMixer test(config);
  Tape tape;
  std::vector<Variable> leaves, outputs;
  std::vector<Tensor> cotangents, y_parts, grad_parts;
  MixerState state;
  const Tensor cotangent = random_tensor(x.shape(), 5);
  for (size_t i = 0; i + 1 < borders.size(); ++i) {
    leaves.push_back(Variable::leaf(steps_of(x, borders[i], borders[i + 1])));
    MixerOutput output =
        test.mixer->forward(leaves.back(), state, steps_of(resets, borders[i], borders[i + 1]));
    state = std::move(output.state);
    y_parts.push_back(output.y.value());
    outputs.push_back(output.y);
    cotangents.push_back(steps_of(cotangent, borders[i], borders[i + 1]));
  }
  Run run;
  for (size_t i = 0; i < state.size(); ++i) {
    run.state.push_back(state[i].value());
    if (!with_state_cotangent || !is_real(state[i])) continue;
    outputs.push_back(state[i]);
    cotangents.push_back(random_tensor(state[i].shape(), 60 + i));
  }
  tape.backward(outputs, cotangents);
  for (const Variable& leaf : leaves) grad_parts.push_back(leaf.gradient().tensor());
  run.y = joined(y_parts, x.shape());
  run.grad_x = joined(grad_parts, x.shape());
  for (const Parameter& parameter : test.store.parameters())
    run.grad_parameters.push_back(parameter.variable->gradient().tensor().clone());
  return run;
}

/// "" or which number differs.
std::string difference(const Run& a, const Run& b, double tolerance) {
  std::string text;
  const auto check = [&](const std::string& name, const Tensor& x, const Tensor& y) {
    const double error = relative_error(x, y);
    if (!(error <= tolerance)) text += fmt::format("{}: error {:.3g}; ", name, error);
  };
  check("y", a.y, b.y);
  check("grad_x", a.grad_x, b.grad_x);
  for (size_t i = 0; i < a.state.size(); ++i) check(fmt::format("state {}", i), a.state[i], b.state[i]);
  for (size_t i = 0; i < a.grad_parameters.size(); ++i)
    check(fmt::format("gradient of parameter {}", i), a.grad_parameters[i], b.grad_parameters[i]);
  return text;
}

std::vector<int64_t> every_step(int64_t length) {
  std::vector<int64_t> borders;
  for (int64_t t = 0; t <= length; ++t) borders.push_back(t);
  return borders;
}

/// Sums of a few dozen f64 products in another order, relative to the largest number of a tensor.
constexpr double reordering = 1e-12;

}  // namespace

TEST_CASE("attention mixer: gradients of x and of all parameters match finite differences") {
  for (const NamedConfig& set : option_sets()) {
    for (const int64_t length : {1, 7, 19}) {
      // With one step, and with a window of one, no score matters: gradients of queries and keys are 0 but for rounding.
      const bool no_scores = length == 1 || set.config.window_size == 0;
      INFO(set.name << ", length " << length);
      const TestMixer test(set.config);
      const Tensor resets = length == 19 ? random_resets(2, length, 0.2) : Tensor();
      std::vector<Tensor> inputs = parameter_values(test.store);
      inputs.insert(inputs.begin(), random_tensor({2, length, d_model}, 1));
      const auto function = [&](const std::vector<Variable>& in) {
        const Variable zero = bind_parameters(test.store, {in.begin() + 1, in.end()});
        const MixerOutput output = test.mixer->forward(in[0], {}, resets.to(in[0].device()));
        std::vector<Variable> outputs{output.y, zero};
        for (const Variable& part : output.state) {
          if (is_real(part)) outputs.push_back(part);
        }
        return outputs;
      };
      CHECK(check_gradient(function, inputs, 1e-6, no_scores ? cpu_only : 1e-5) == "");
    }
  }
}

TEST_CASE("attention mixer: gradients of the incoming state match finite differences") {
  for (const size_t index : {1, 3}) {
    const TestMixer test(option_sets()[index].config);
    const MixerState before = test.mixer->forward(Variable(random_tensor({2, 8, d_model}, 1)), {}, {}).state;
    std::vector<Tensor> inputs{random_tensor({2, 11, d_model}, 2)};
    for (size_t i = 0; i < before.size(); ++i) {
      if (is_real(before[i])) inputs.push_back(random_tensor(before[i].shape(), 10 + i));
    }
    const std::vector<Tensor> values = parameter_values(test.store);
    const auto function = [&](const std::vector<Variable>& in) {
      std::vector<Variable> constants;
      for (const Tensor& value : values) constants.emplace_back(value.to(in[0].dtype()).to(in[0].device()));
      bind_parameters(test.store, constants);
      MixerState state(in.begin() + 1, in.end());
      state.insert(state.begin() + 2, Variable(before[2].value().to(in[0].device())));
      const MixerOutput output = test.mixer->forward(in[0], state, {});
      std::vector<Variable> outputs{output.y};
      for (const Variable& part : output.state) {
        if (is_real(part)) outputs.push_back(part);
      }
      return outputs;
    };
    INFO(option_sets()[index].name);
    CHECK(check_gradient(function, inputs) == "");
  }
}

TEST_CASE("attention mixer: step by step, in pieces and whole are one function") {
  const int64_t length = 23;
  const Tensor x = random_tensor({2, length, d_model}, 1);
  for (const bool with_documents : {false, true}) {
    const Tensor resets = with_documents ? random_resets(2, length, 0.1) : Tensor();
    for (const NamedConfig& set : option_sets()) {
      INFO(set.name << (with_documents ? ", documents" : ""));
      const Run whole = run_pieces(set.config, x, resets, {0, length});
      for (const std::vector<int64_t>& borders :
           {every_step(length), {0, 1, length}, {0, 13, length}, {0, 2, 3, 16, length - 1, length}}) {
        INFO(borders.size() - 1 << " pieces");
        CHECK(difference(run_pieces(set.config, x, resets, borders), whole, reordering) == "");
      }
    }
  }
}

TEST_CASE("attention mixer: a reset begins a document that nothing before it reaches, convolution included") {
  const std::vector<int64_t> starts{0, 4, 5, 13};
  const int64_t length = 21;
  const Tensor x = random_tensor({1, length, d_model}, 1);
  const Tensor resets = Tensor::zeros({1, length}, DType::i32);
  for (const int64_t start : starts) resets.data<int32_t>()[start] = start > 0 ? 1 : 0;
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const Run packed = run_pieces(set.config, x, resets, {0, length}, false);
    const Tensor cotangent = random_tensor(x.shape(), 5);
    std::vector<Tensor> grad_parameters;
    for (size_t i = 0; i < starts.size(); ++i) {
      const int64_t begin = starts[i], end = i + 1 < starts.size() ? starts[i + 1] : length;
      INFO("document " << i);
      const TestMixer test(set.config);
      Tape tape;
      const Variable leaf = Variable::leaf(steps_of(x, begin, end));
      const MixerOutput output = test.mixer->forward(leaf, {}, {});
      tape.backward({output.y}, {steps_of(cotangent, begin, end)});
      CHECK(relative_error(steps_of(packed.y, begin, end), output.y.value()) < reordering);
      CHECK(relative_error(steps_of(packed.grad_x, begin, end), leaf.gradient().tensor()) < reordering);
      for (size_t p = 0; p < test.store.parameters().size(); ++p) {
        const Tensor& gradient = test.store.parameters()[p].variable->gradient().tensor();
        if (i == 0) grad_parameters.push_back(gradient.clone());
        if (i > 0) add_in_place(grad_parameters[p], gradient);
      }
    }
    for (size_t p = 0; p < grad_parameters.size(); ++p)
      CHECK(relative_error(packed.grad_parameters[p], grad_parameters[p]) < reordering);
  }
}

TEST_CASE("attention mixer: future inputs do not change past outputs") {
  const TestMixer test(small_config());
  const Tensor x = random_tensor({1, 20, d_model}, 1);
  const Tensor before = test.mixer->forward(Variable(x), {}, {}).y.value();
  x.data<double>()[11 * d_model] += 1.0;
  const Tensor after = test.mixer->forward(Variable(x), {}, {}).y.value();
  CHECK(relative_error(steps_of(after, 0, 11), steps_of(before, 0, 11)) == 0.0);
  CHECK(relative_error(steps_of(after, 11, 12), steps_of(before, 11, 12)) > 1e-6);
}

TEST_CASE("attention mixer: f32 agrees with f64") {
  const Tensor x = random_tensor({2, 65, d_model}, 1);
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer exact(set.config);
    const TestMixer rounded(set.config, DType::f32);
    const Tensor y = rounded.mixer->forward(Variable(x.to(DType::f32)), {}, {}).y.value();
    // Rounding of inputs, parameters and scores of some units, which the exponential makes relative errors of.
    CHECK(relative_error(y, exact.mixer->forward(Variable(x), {}, {}).y.value()) < 100 * 6e-8);
  }
}

TEST_CASE("attention mixer: parameters have the names and shapes of published checkpoints") {
  const auto declared = [](const AttentionConfig& config) {
    const TestMixer test(config);
    std::string text;
    for (const Parameter& parameter : test.store.parameters())
      text += fmt::format("{} {}{}\n", parameter.name, parameter.shape.str(),
                          parameter.attributes.weight_decay ? "" : " no decay");
    return text;
  };
  CHECK(declared(small_config()) ==
        "in_proj.weight (18, 6)\n"
        "out_proj.weight (6, 6)\n");
  AttentionConfig config = small_config();
  config.n_heads = 4;
  config.n_kv_heads = 2;
  config.head_dim = 5;
  config.d_conv = 4;
  config.qkv_proj_bias = true;
  config.out_proj_bias = true;
  CHECK(declared(config) ==
        "in_proj.weight (40, 6)\n"
        "conv1d.weight (40, 1, 4)\n"
        "out_proj.weight (6, 20)\n"
        "in_proj.bias (40) no decay\n"
        "conv1d.bias (40) no decay\n"
        "out_proj.bias (6) no decay\n");
}

TEST_CASE("attention mixer: initial values") {
  AttentionConfig config = small_config();
  config.head_dim = 50;
  config.d_conv = 4;
  config.qkv_proj_bias = true;
  ParameterStore store;
  const auto mixer = config.make(100, 4);
  mixer->declare_parameters(ParameterScope(store, ""));
  store.allocate(DType::f64);
  store.initialize(3);
  const auto most = [&](const char* name) {
    double largest = 0.0;
    for (const double value : store.find(name)->variable->value().to_vector<double>())
      largest = std::max(largest, std::abs(value));
    return largest;
  };
  // Of hundreds of uniform draws the largest lies within a few per cent of the bound.
  const auto is_bound = [&](const char* name, double bound) {
    return most(name) <= bound && most(name) > 0.95 * bound;
  };
  CHECK(is_bound("in_proj.weight", 0.1));
  CHECK(is_bound("conv1d.weight", 0.5));
  CHECK(is_bound("conv1d.bias", 0.5));
  CHECK(is_bound("out_proj.weight", 0.05));
  CHECK(most("in_proj.bias") == 0.0);
}

TEST_CASE("attention mixer: the state grows with the tokens up to the window; state_size says by how much") {
  const auto size_after = [](const AttentionConfig& config, int64_t length) {
    const TestMixer test(config);
    int64_t size = 0;
    for (const Variable& part :
         test.mixer->forward(Variable(random_tensor({1, length, d_model}, 1)), {}, {}).state)
      size += part.value().numel();
    return size;
  };
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const int64_t state_size = TestMixer(set.config).mixer->state_size();
    if (set.config.window_size >= 0) {
      CHECK(size_after(set.config, 9) == state_size);
      CHECK(size_after(set.config, 20) == state_size);
    } else {
      CHECK(size_after(set.config, 1) == state_size);
      const int64_t per_token = size_after(set.config, 2) - size_after(set.config, 1);
      CHECK(size_after(set.config, 20) == state_size + 19 * per_token);
    }
  }
}

TEST_CASE("attention mixer: sizes that do not fit together are refused by name") {
  const auto error = [](const std::function<void(AttentionConfig&)>& change) {
    AttentionConfig config;
    config.n_heads = 4;
    change(config);
    return input_error_of([&] { config.validate(96, "model.mixer"); });
  };
  CHECK(error([](AttentionConfig&) {}) == "(no error)");
  CHECK(error([](AttentionConfig& config) { config.n_heads = 0; }) ==
        "model.mixer.n_heads is missing; write the number of heads, such as n_heads: 4");
  CHECK(error([](AttentionConfig& config) { config.n_heads = 5; }) ==
        "model.mixer.n_heads is 5; it must divide d_model = 96, or head_dim must be given");
  CHECK(error([](AttentionConfig& config) {
          config.n_heads = 5;
          config.head_dim = 8;
        }) == "(no error)");
  CHECK(error([](AttentionConfig& config) { config.n_kv_heads = 3; }) ==
        "model.mixer.n_kv_heads is 3; it must divide n_heads = 4");
  CHECK(error([](AttentionConfig& config) { config.causal = false; }) ==
        "model.mixer.causal is false; only causal attention is built, whose state can be handed along a "
        "sequence");
  CHECK(error([](AttentionConfig& config) { config.d_conv = 1; }) ==
        "model.mixer.d_conv is 1; it must be 0 (no convolution) or at least 2");
  CHECK(error([](AttentionConfig& config) { config.rotary_dim = 26; }) ==
        "model.mixer.rotary_dim is 26; it must be even and not exceed head_dim = 24");
  CHECK(error([](AttentionConfig& config) { config.rotary_dim = 3; }) ==
        "model.mixer.rotary_dim is 3; it must be even and not exceed head_dim = 24");
}
