#include "models/mixers/mamba.h"

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

/// 12 inner channels, steps of rank 2.
MambaConfig small_config() {
  MambaConfig config;
  config.d_state = 5;
  config.dt_rank = 2;
  return config;
}

struct NamedConfig {
  std::string name;
  MambaConfig config;
};

/// Every option away from its default at least once.
std::vector<NamedConfig> option_sets() {
  std::vector<NamedConfig> sets{{"defaults", small_config()}};
  const auto add = [&](const std::string& name, const std::function<void(MambaConfig&)>& change) {
    sets.push_back({name, small_config()});
    change(sets.back().config);
  };
  add("biases, dt_rank by itself", [](MambaConfig& config) {
    config.bias = true;
    config.dt_rank = std::nullopt;
    config.dt_max = 0.5;
  });
  add("no conv_bias, constant dt_init", [](MambaConfig& config) {
    config.conv_bias = false;
    config.dt_init = "constant";
    config.dt_scale = 0.7;
    config.d_conv = 2;
    config.d_state = 1;
  });
  add("one tap", [](MambaConfig& config) {
    config.d_conv = 1;
    config.expand = 3;
  });
  return sets;
}

/// A mixer whose parameters are all random: none is 0 or 1, where mistakes hide.
struct TestMixer {
  explicit TestMixer(const MambaConfig& config, DType dtype = DType::f64) : mixer(config.make(d_model, 2)) {
    mixer->declare_parameters(ParameterScope(store, ""));
    store.allocate(dtype);
    store.initialize(11);
    for (const Parameter& parameter : store.parameters()) {
      const bool is_constant = parameter.name == "D" || parameter.name == "A_log" ||
                               parameter.name == "in_proj.bias" || parameter.name == "out_proj.bias";
      const Tensor noise = random_tensor(parameter.shape, stream_id(parameter.name), is_constant ? 0.5 : 0.0);
      add_in_place(parameter.value, noise.to(dtype));
    }
  }

  std::unique_ptr<Mixer> mixer;
  ParameterStore store;
};

struct Run {
  Tensor y, grad_x;
  std::vector<Tensor> state, grad_parameters;
};

/// Forward and backward, the sequence cut at `borders` (which begin with 0 and end with the length), the state
/// handed over in between.
Run run_pieces(const MambaConfig& config, const Tensor& x, const Tensor& resets,
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
    if (!with_state_cotangent) continue;
    outputs.push_back(state[i]);
    cotangents.push_back(random_tensor(state[i].shape(), 60 + i));
  }
  tape.backward(outputs, cotangents);
  for (const Variable& leaf : leaves) grad_parts.push_back(leaf.gradient().tensor());
  const auto join = [&](const std::vector<Tensor>& parts) {
    const Tensor whole = empty_like(x);
    const int64_t width = x.dim(2);
    for (int64_t b = 0; b < x.dim(0); ++b) {
      int64_t t = b * x.dim(1);
      for (const Tensor& part : parts) {
        const int64_t count = part.dim(1) * width;
        whole.view(t * width, {count}).copy_from(part.view(b * count, {count}));
        t += part.dim(1);
      }
    }
    return whole;
  };
  run.y = join(y_parts);
  run.grad_x = join(grad_parts);
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

TEST_CASE("mamba: gradients of x and of all parameters match finite differences") {
  for (const NamedConfig& set : option_sets()) {
    for (const int64_t length : {1, 7, 19}) {
      INFO(set.name << ", length " << length);
      const TestMixer test(set.config);
      const Tensor resets = length == 19 ? random_resets(2, length, 0.2) : Tensor();
      std::vector<Tensor> inputs = parameter_values(test.store);
      inputs.insert(inputs.begin(), random_tensor({2, length, d_model}, 1));
      const auto function = [&](const std::vector<Variable>& in) {
        const Variable zero = bind_parameters(test.store, {in.begin() + 1, in.end()});
        const MixerOutput output = test.mixer->forward(in[0], {}, resets.to(in[0].device()));
        std::vector<Variable> outputs{output.y, zero};
        outputs.insert(outputs.end(), output.state.begin(), output.state.end());
        return outputs;
      };
      CHECK(check_gradient(function, inputs) == "");
    }
  }
}

TEST_CASE("mamba: gradients of the incoming state match finite differences") {
  const TestMixer test(option_sets()[1].config);
  MixerState shapes = test.mixer->forward(Variable(random_tensor({2, 3, d_model}, 1)), {}, {}).state;
  std::vector<Tensor> inputs{random_tensor({2, 11, d_model}, 2)};
  for (size_t i = 0; i < shapes.size(); ++i) inputs.push_back(random_tensor(shapes[i].shape(), 10 + i));
  const std::vector<Tensor> values = parameter_values(test.store);
  const auto function = [&](const std::vector<Variable>& in) {
    std::vector<Variable> constants;
    for (const Tensor& value : values) constants.emplace_back(value.to(in[0].dtype()).to(in[0].device()));
    bind_parameters(test.store, constants);
    const MixerOutput output = test.mixer->forward(in[0], MixerState(in.begin() + 1, in.end()), {});
    std::vector<Variable> outputs{output.y};
    outputs.insert(outputs.end(), output.state.begin(), output.state.end());
    return outputs;
  };
  CHECK(check_gradient(function, inputs) == "");
}

TEST_CASE("mamba: step by step is the whole sequence at once") {
  const int64_t length = 37;
  const Tensor x = random_tensor({2, length, d_model}, 1);
  for (const bool with_documents : {false, true}) {
    const Tensor resets = with_documents ? random_resets(2, length, 0.15) : Tensor();
    for (const NamedConfig& set : option_sets()) {
      INFO(set.name << (with_documents ? ", documents" : ""));
      const Run whole = run_pieces(set.config, x, resets, {0, length});
      CHECK(difference(run_pieces(set.config, x, resets, every_step(length)), whole, reordering) == "");
    }
  }
}

TEST_CASE("mamba: a state handed over gives the outputs and gradients of the whole") {
  const int64_t length = 29;
  const Tensor x = random_tensor({2, length, d_model}, 1), resets = random_resets(2, length, 0.1);
  for (const NamedConfig& set : option_sets()) {
    const Run whole = run_pieces(set.config, x, resets, {0, length});
    for (const std::vector<int64_t>& borders :
         {std::vector<int64_t>{0, 1, length}, {0, 13, length}, {0, 2, 3, 16, length - 1, length}}) {
      INFO(set.name << ", " << borders.size() - 1 << " pieces");
      CHECK(difference(run_pieces(set.config, x, resets, borders), whole, reordering) == "");
    }
  }
}

TEST_CASE("mamba: a reset begins a document that nothing before it reaches, windows included") {
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
      for (size_t s = 0; i + 1 == starts.size() && s < packed.state.size(); ++s)
        CHECK(relative_error(packed.state[s], output.state[s].value()) < reordering);
    }
    for (size_t p = 0; p < grad_parameters.size(); ++p)
      CHECK(relative_error(packed.grad_parameters[p], grad_parameters[p]) < reordering);
  }
}

TEST_CASE("mamba: future inputs do not change past outputs") {
  const TestMixer test(small_config());
  const Tensor x = random_tensor({1, 20, d_model}, 1);
  const Tensor before = test.mixer->forward(Variable(x), {}, {}).y.value();
  x.data<double>()[11 * d_model] += 1.0;
  const Tensor after = test.mixer->forward(Variable(x), {}, {}).y.value();
  CHECK(relative_error(steps_of(after, 0, 11), steps_of(before, 0, 11)) == 0.0);
  CHECK(relative_error(steps_of(after, 11, 12), steps_of(before, 11, 12)) > 1e-6);
}

TEST_CASE("mamba: f32 agrees with f64") {
  const Tensor x = random_tensor({2, 65, d_model}, 1);
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer exact(set.config);
    const TestMixer rounded(set.config, DType::f32);
    const Tensor y = rounded.mixer->forward(Variable(x.to(DType::f32)), {}, {}).y.value();
    // Rounding of inputs, parameters and a few hundred operations: some ten units of 2^-24, and a norm may enlarge
    // them where its group is small.
    CHECK(relative_error(y, exact.mixer->forward(Variable(x), {}, {}).y.value()) < 100 * 6e-8);
  }
}

TEST_CASE("mamba: parameters have the names and shapes of published checkpoints") {
  const auto declared = [](const MambaConfig& config) {
    const TestMixer test(config);
    std::string text;
    for (const Parameter& parameter : test.store.parameters())
      text += fmt::format("{} {}{}\n", parameter.name, parameter.shape.str(),
                          parameter.attributes.weight_decay ? "" : " no decay");
    return text;
  };
  CHECK(declared(small_config()) ==
        "in_proj.weight (24, 6)\n"
        "conv1d.weight (12, 1, 4)\n"
        "x_proj.weight (12, 12)\n"
        "dt_proj.weight (12, 2)\n"
        "out_proj.weight (6, 12)\n"
        "conv1d.bias (12) no decay\n"
        "dt_proj.bias (12) no decay\n"
        "A_log (12, 5) no decay\n"
        "D (12) no decay\n");
  MambaConfig config = small_config();
  config.bias = true;
  config.conv_bias = false;
  config.dt_rank = std::nullopt;
  CHECK(declared(config) ==
        "in_proj.weight (24, 6)\n"
        "conv1d.weight (12, 1, 4)\n"
        "x_proj.weight (11, 12)\n"
        "dt_proj.weight (12, 1)\n"
        "out_proj.weight (6, 12)\n"
        "in_proj.bias (24) no decay\n"
        "dt_proj.bias (12) no decay\n"
        "A_log (12, 5) no decay\n"
        "D (12) no decay\n"
        "out_proj.bias (6) no decay\n");
}

TEST_CASE("mamba: initial values") {
  MambaConfig config = small_config();
  config.expand = 200;  // 1200 channels
  config.dt_min = 1e-5;
  config.dt_max = 0.1;
  config.dt_init_floor = 1e-3;
  config.dt_scale = 0.5;
  const auto draw = [](const MambaConfig& of, const char* name) {
    ParameterStore store;
    const auto mixer = of.make(d_model, 4);
    mixer->declare_parameters(ParameterScope(store, ""));
    store.allocate(DType::f64);
    store.initialize(3);
    return store.find(name)->variable->value().to_vector<double>();
  };
  const auto largest = [&](const MambaConfig& of, const char* name) {
    double most = 0.0;
    for (const double value : draw(of, name)) most = std::max(most, std::abs(value));
    return most;
  };
  double least = 1e30, most = 0.0;
  int64_t n_floored = 0;
  for (const double bias : draw(config, "dt_proj.bias")) {
    const double dt = std::log1p(std::exp(bias));
    least = std::min(least, dt);
    most = std::max(most, dt);
    n_floored += dt < 1e-3 * (1 + 1e-9) ? 1 : 0;
  }
  // softplus(log(e^dt - 1)) = dt up to the rounding of either.
  CHECK(least > 1e-3 * (1 - 1e-9));
  CHECK(most < 0.1 * (1 + 1e-9));
  CHECK(most > 0.09);
  // Log-uniform on 1e-5 ... 1e-1: half of the draws lie below the floor.
  CHECK(n_floored > 500);
  CHECK(n_floored < 700);
  const std::vector<double> A_log = draw(config, "A_log");
  for (size_t i = 0; i < A_log.size(); ++i) CHECK(A_log[i] == std::log(static_cast<double>(i % 5 + 1)));
  for (const double D : draw(config, "D")) CHECK(D == 1.0);
  // Each uniform up to a bound, which the largest of thousands comes close to.
  const auto check_bound = [](double found, double bound) {
    CHECK(found <= bound);
    CHECK(found > 0.95 * bound);
  };
  check_bound(largest(config, "in_proj.weight"), 1.0 / std::sqrt(6.0));
  check_bound(largest(config, "conv1d.weight"), 0.5);
  check_bound(largest(config, "conv1d.bias"), 0.5);
  check_bound(largest(config, "x_proj.weight"), 1.0 / std::sqrt(1200.0));
  check_bound(largest(config, "dt_proj.weight"), 0.5 / std::sqrt(2.0));
  check_bound(largest(config, "out_proj.weight"), 1.0 / std::sqrt(1200.0 * 4));
  config.dt_init = "constant";
  for (const double weight : draw(config, "dt_proj.weight")) CHECK(weight == 0.5 / std::sqrt(2.0));
}

TEST_CASE("mamba: the state is what state_size says, and its published layout is the authors'") {
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer test(set.config);
    const MixerState state = test.mixer->forward(Variable(random_tensor({3, 9, d_model}, 1)), {}, {}).state;
    int64_t size = 0;
    for (const Variable& part : state) size += part.value().numel();
    CHECK(size == 3 * test.mixer->state_size());
  }
  const TestMixer test(small_config());
  const MixerState state = test.mixer->forward(Variable(random_tensor({3, 9, d_model}, 1)), {}, {}).state;
  const auto published = test.mixer->published_state(state);
  CHECK(published.at("final_conv_state").shape() == Shape{3, 12, 4});
  CHECK(published.at("final_ssm_state").shape() == Shape{3, 12, 5});
  CHECK(published.at("final_conv_state").value().to_vector<double>()[1] ==
        state[0].value().to_vector<double>()[12]);
}

TEST_CASE("mamba: the published 130m model has 129,135,360 parameters") {
  ParameterStore store;
  const auto mixer = MambaConfig().make(768, 24);
  mixer->declare_parameters(ParameterScope(store, ""));
  int64_t layer = 768;  // its norm
  for (const Parameter& parameter : store.parameters()) layer += parameter.shape.numel();
  CHECK(50280 * 768 + 24 * layer + 768 == 129135360);
}

TEST_CASE("mamba: the published 130m layer carries 24,576 numbers of SSM state") {
  const auto mixer = MambaConfig().make(768, 24);
  CHECK(mixer->state_size() == 1536 * 16 + 1536 * 4);
}

TEST_CASE("mamba: sizes that do not fit together are refused by name") {
  const auto error = [](const std::function<void(MambaConfig&)>& change) {
    MambaConfig config;
    change(config);
    return input_error_of([&] { config.validate(96, "model.mixer"); });
  };
  CHECK(error([](MambaConfig&) {}) == "(no error)");
  CHECK(error([](MambaConfig& config) { config.dt_min = 0.5; }) ==
        "model.mixer.dt_min is 0.5; it must not exceed dt_max = 0.1");
  CHECK(
      error([](MambaConfig& config) { config.dt_rank = 193; }) ==
      "model.mixer.dt_rank is 193; it must not exceed expand * d_model = 192, the step sizes that it gives");
}
