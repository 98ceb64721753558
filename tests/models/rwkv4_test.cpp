#include "models/mixers/rwkv4.h"

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

struct NamedConfig {
  std::string name;
  std::shared_ptr<MixerConfig> config;
};

/// Both layers, with their widths away from the defaults too.
std::vector<NamedConfig> all_configs() {
  const auto time_mix = std::make_shared<Rwkv4TimeMixConfig>();
  const auto wide_time_mix = std::make_shared<Rwkv4TimeMixConfig>();
  wide_time_mix->dim_att = 9;
  const auto channel_mix = std::make_shared<Rwkv4ChannelMixConfig>();
  const auto narrow_channel_mix = std::make_shared<Rwkv4ChannelMixConfig>();
  narrow_channel_mix->dim_ffn = 5;
  return {{"time mix", time_mix},
          {"time mix, dim_att", wide_time_mix},
          {"channel mix", channel_mix},
          {"channel mix, dim_ffn", narrow_channel_mix}};
}

/// A mixer whose parameters are all random: none is 0, where mistakes hide.
struct TestMixer {
  explicit TestMixer(const MixerConfig& config, DType dtype = DType::f64)
      : mixer(config.make_layer(d_model, 3, 1)) {
    mixer->declare_parameters(ParameterScope(store, ""));
    store.allocate(dtype);
    store.initialize(11);
    for (const Parameter& parameter : store.parameters())
      add_in_place(parameter.value, random_tensor(parameter.shape, stream_id(parameter.name), 0.4).to(dtype));
  }

  std::unique_ptr<Mixer> mixer;
  ParameterStore store;
};

struct Run {
  Tensor y, grad_x;
  std::vector<Tensor> state, grad_parameters;
};

/// Forward and backward, the sequence cut at `borders` (which begin with 0 and end with the length), the state handed
/// over in between. One sequence, so that pieces lie behind one another.
Run run_pieces(const MixerConfig& config, const Tensor& x, const Tensor& resets,
               const std::vector<int64_t>& borders, bool with_state_cotangent = true) {
  const TestMixer test(config);
  const Tensor cotangent = random_tensor(x.shape(), 5);
  Run run{empty_like(x), empty_like(x), {}, {}};
  const auto rows = [](const Tensor& whole, int64_t begin, int64_t end) {
    return whole.view(begin * d_model, {1, end - begin, d_model});
  };
  Tape tape;
  std::vector<Variable> leaves, outputs;
  std::vector<Tensor> cotangents;
  MixerState state;
  for (size_t i = 0; i + 1 < borders.size(); ++i) {
    const int64_t begin = borders[i], end = borders[i + 1];
    leaves.push_back(Variable::leaf(steps_of(x, begin, end)));
    MixerOutput output = test.mixer->forward(leaves.back(), state, steps_of(resets, begin, end));
    state = std::move(output.state);
    rows(run.y, begin, end).copy_from(output.y.value());
    outputs.push_back(output.y);
    cotangents.push_back(steps_of(cotangent, begin, end));
  }
  for (size_t i = 0; i < state.size(); ++i) {
    run.state.push_back(state[i].value());
    if (!with_state_cotangent) continue;
    outputs.push_back(state[i]);
    cotangents.push_back(random_tensor(state[i].shape(), 60 + i));
  }
  tape.backward(outputs, cotangents);
  for (size_t i = 0; i < leaves.size(); ++i)
    rows(run.grad_x, borders[i], borders[i + 1]).copy_from(leaves[i].gradient().tensor());
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

/// Sums of a few dozen f64 products in another order, relative to the largest number of a tensor.
constexpr double reordering = 1e-12;

}  // namespace

TEST_CASE("rwkv4: gradients of x and of all parameters match finite differences") {
  for (const NamedConfig& set : all_configs()) {
    for (const int64_t length : {1, 7, 35}) {
      INFO(set.name << ", length " << length);
      const TestMixer test(*set.config);
      const Tensor resets = length == 35 ? random_resets(2, length, 0.1) : Tensor();
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

TEST_CASE("rwkv4: gradients of the incoming state match finite differences") {
  for (const NamedConfig& set : all_configs()) {
    INFO(set.name);
    const TestMixer test(*set.config);
    const MixerState shapes = test.mixer->forward(Variable(random_tensor({2, 3, d_model}, 1)), {}, {}).state;
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
}

TEST_CASE("rwkv4: step by step, and in pieces, is the whole, gradients too") {
  const int64_t length = 37;
  const Tensor x = random_tensor({1, length, d_model}, 1);
  std::vector<int64_t> every_step;
  for (int64_t t = 0; t <= length; ++t) every_step.push_back(t);
  for (const bool with_documents : {false, true}) {
    const Tensor resets = with_documents ? random_resets(1, length, 0.15) : Tensor();
    for (const NamedConfig& set : all_configs()) {
      const Run whole = run_pieces(*set.config, x, resets, {0, length});
      for (const std::vector<int64_t>& borders : {std::vector<int64_t>{0, 1, length},
                                                  {0, 13, length},
                                                  {0, 2, 3, 16, length - 1, length},
                                                  every_step}) {
        INFO(set.name << (with_documents ? ", documents, " : ", ") << borders.size() - 1 << " pieces");
        CHECK(difference(run_pieces(*set.config, x, resets, borders), whole, reordering) == "");
      }
    }
  }
}

TEST_CASE("rwkv4: a reset begins a document that nothing before it reaches") {
  const std::vector<int64_t> starts{0, 4, 5, 13};
  const int64_t length = 21;
  const Tensor x = random_tensor({1, length, d_model}, 1);
  const Tensor resets = Tensor::zeros({1, length}, DType::i32);
  for (const int64_t start : starts) resets.data<int32_t>()[start] = start > 0 ? 1 : 0;
  for (const NamedConfig& set : all_configs()) {
    INFO(set.name);
    const Run packed = run_pieces(*set.config, x, resets, {0, length}, false);
    const Tensor cotangent = random_tensor(x.shape(), 5);
    const TestMixer test(*set.config);  // gradients of the parameters gather over the documents
    for (size_t i = 0; i < starts.size(); ++i) {
      const int64_t begin = starts[i], end = i + 1 < starts.size() ? starts[i + 1] : length;
      INFO("document " << i);
      Tape tape;
      const Variable leaf = Variable::leaf(steps_of(x, begin, end));
      const MixerOutput output = test.mixer->forward(leaf, {}, {});
      tape.backward({output.y}, {steps_of(cotangent, begin, end)});
      CHECK(relative_error(steps_of(packed.y, begin, end), output.y.value()) < reordering);
      CHECK(relative_error(steps_of(packed.grad_x, begin, end), leaf.gradient().tensor()) < reordering);
      for (size_t s = 0; i + 1 == starts.size() && s < packed.state.size(); ++s)
        CHECK(relative_error(packed.state[s], output.state[s].value()) < reordering);
    }
    for (size_t p = 0; p < packed.grad_parameters.size(); ++p)
      CHECK(relative_error(packed.grad_parameters[p],
                           test.store.parameters()[p].variable->gradient().tensor()) < reordering);
  }
}

TEST_CASE("rwkv4: future inputs do not change past outputs") {
  for (const NamedConfig& set : all_configs()) {
    INFO(set.name);
    const TestMixer test(*set.config);
    const Tensor x = random_tensor({1, 20, d_model}, 1);
    const Tensor before = test.mixer->forward(Variable(x), {}, {}).y.value();
    x.data<double>()[11 * d_model] += 1.0;
    const Tensor after = test.mixer->forward(Variable(x), {}, {}).y.value();
    CHECK(relative_error(steps_of(after, 0, 11), steps_of(before, 0, 11)) == 0.0);
    CHECK(relative_error(steps_of(after, 11, 12), steps_of(before, 11, 12)) > 1e-6);
  }
}

TEST_CASE("rwkv4: f32 agrees with f64") {
  const Tensor x = random_tensor({2, 65, d_model}, 1);
  for (const NamedConfig& set : all_configs()) {
    INFO(set.name);
    const TestMixer exact(*set.config), rounded(*set.config, DType::f32);
    const Tensor y = rounded.mixer->forward(Variable(x.to(DType::f32)), {}, {}).y.value();
    // Rounding of inputs, parameters and a few hundred operations: some ten units of 2^-24.
    CHECK(relative_error(y, exact.mixer->forward(Variable(x), {}, {}).y.value()) < 100 * 6e-8);
  }
}

TEST_CASE("rwkv4: the state is as large as it says") {
  for (const NamedConfig& set : all_configs()) {
    const TestMixer test(*set.config);
    int64_t size = 0;
    for (const Variable& part :
         test.mixer->forward(Variable(random_tensor({1, 2, d_model}, 1)), {}, {}).state)
      size += part.value().numel();
    CHECK(test.mixer->state_size() == size);
  }
}

TEST_CASE("rwkv4: the published state is that of the authors' recurrence") {
  const TestMixer time_mix(Rwkv4TimeMixConfig{}), channel_mix(Rwkv4ChannelMixConfig{});
  const Variable x(random_tensor({2, 1, d_model}, 1));
  const auto published = time_mix.mixer->published_state(time_mix.mixer->forward(x, {}, {}).state);
  // After one step: aa = e^(k - pp) v and bb = e^(k - pp), with k and v of x alone, mixed with a past of zeros.
  const auto product = [&](const char* matrix, const char* mix, int64_t b, int64_t row) {
    double sum = 0.0;
    for (int64_t c = 0; c < d_model; ++c)
      sum += time_mix.store.find(matrix)->value.data<double>()[row * d_model + c] *
             time_mix.store.find(mix)->value.data<double>()[c] * x.value().data<double>()[b * d_model + c];
    return sum;
  };
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t c = 0; c < d_model; ++c) {
      const auto at = [&](const char* name) {
        return published.at(name).value().data<double>()[b * d_model + c];
      };
      const double weight = std::exp(product("key.weight", "time_mix_k", b, c) - at("att_pp"));
      CHECK(at("att_bb") == Approx(weight).epsilon(1e-12));
      CHECK(at("att_aa") == Approx(weight * product("value.weight", "time_mix_v", b, c)).epsilon(1e-12));
      CHECK(at("att_xx") == x.value().data<double>()[b * d_model + c]);
    }
  }
  const auto shifted = channel_mix.mixer->published_state(channel_mix.mixer->forward(x, {}, {}).state);
  CHECK(shifted.at("ffn_xx").value().to_vector<double>() == x.value().to_vector<double>());
}

TEST_CASE("rwkv4: parameters have the authors' names, shapes and learning rates") {
  const auto declared = [](const MixerConfig& config) {
    const TestMixer test(config);
    std::string text;
    for (const Parameter& parameter : test.store.parameters())
      text += fmt::format("{} {} x{}{}\n", parameter.name, parameter.shape.str(),
                          parameter.attributes.learning_rate_scale,
                          parameter.attributes.weight_decay ? "" : " no decay");
    return text;
  };
  CHECK(declared(*all_configs()[1].config) ==
        "key.weight (9, 6) x1\n"
        "value.weight (9, 6) x1\n"
        "receptance.weight (9, 6) x1\n"
        "output.weight (6, 9) x1\n"
        "time_mix_k (6) x1 no decay\n"
        "time_mix_v (6) x1 no decay\n"
        "time_mix_r (6) x1 no decay\n"
        "time_decay (9) x2 no decay\n"
        "time_first (9) x3 no decay\n");
  CHECK(declared(*all_configs()[3].config) ==
        "key.weight (5, 6) x1\n"
        "value.weight (6, 5) x1\n"
        "receptance.weight (6, 6) x1\n"
        "time_mix_k (6) x1 no decay\n"
        "time_mix_r (6) x1 no decay\n");
}

TEST_CASE("rwkv4: initial values depend on the layer's place") {
  const auto initial = [](const MixerConfig& config, int64_t layer_id, int64_t n_layers,
                          const std::string& name) {
    const std::unique_ptr<Mixer> mixer = config.make_layer(4, n_layers, layer_id);
    ParameterStore store;
    mixer->declare_parameters(ParameterScope(store, ""));
    store.allocate(DType::f64);
    store.initialize(1);
    return store.find(name)->value.to_vector<double>();
  };
  const auto near = [](const std::vector<double>& values, const std::vector<double>& expected) {
    double error = values.size() == expected.size() ? 0.0 : 1.0;
    for (size_t i = 0; error < 1.0 && i < values.size(); ++i)
      error = std::max(error, std::abs(values[i] - expected[i]));
    return error < 1e-12;
  };
  Rwkv4TimeMixConfig time_mix;
  // First of 3 layers: a = 0, b = 1. Last: a = 1, b = 1/3.
  CHECK(near(initial(time_mix, 0, 3, "time_mix_k"), {0.0, 0.25, 0.5, 0.75}));
  CHECK(near(initial(time_mix, 0, 3, "time_mix_v"), {0.0, 0.25, 0.5, 0.75}));
  CHECK(near(initial(time_mix, 0, 3, "time_mix_r"), {0.0, 0.5, std::sqrt(0.5), std::sqrt(0.75)}));
  CHECK(near(initial(time_mix, 2, 3, "time_mix_v"),
             {0.3, std::cbrt(0.25) + 0.3, std::cbrt(0.5) + 0.3, std::cbrt(0.75) + 0.3}));
  CHECK(near(initial(time_mix, 2, 3, "time_decay"), {-5.0, -5.0 + 8.0 / 9.0, -5.0 + 32.0 / 9.0, 3.0}));
  CHECK(near(initial(time_mix, 0, 1, "time_decay"),
             {-5.0, -5.0 + 8.0 * std::pow(1.0 / 3.0, 0.7), -5.0 + 8.0 * std::pow(2.0 / 3.0, 0.7), 3.0}));
  CHECK(near(initial(time_mix, 0, 3, "time_first"),
             {std::log(0.3), std::log(0.3) + 0.5, std::log(0.3) - 0.5, std::log(0.3)}));
  CHECK(near(initial(time_mix, 0, 3, "output.weight"), std::vector<double>(16, 0.0)));
  time_mix.place = {2, 3};
  CHECK(near(initial(time_mix, 0, 1, "time_mix_v"),
             {0.3, std::cbrt(0.25) + 0.3, std::cbrt(0.5) + 0.3, std::cbrt(0.75) + 0.3}));

  // Four times as many rows: columns are orthogonal, of length sqrt(4).
  const std::vector<double> key = initial(Rwkv4ChannelMixConfig(), 1, 2, "key.weight");
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      double product = 0.0;
      for (int64_t row = 0; row < 16; ++row) product += key[row * 4 + i] * key[row * 4 + j];
      CHECK(std::abs(product - (i == j ? 4.0 : 0.0)) < 1e-12);
    }
  }
}

TEST_CASE("rwkv4: names what is wrong in a config") {
  Rwkv4TimeMixConfig time_mix;
  time_mix.place.layer_id = 1;
  CHECK(input_error_of([&] { time_mix.validate(d_model, "mixer"); }) ==
        "mixer: layer_id and n_layers go together; give both or neither");
  Rwkv4ChannelMixConfig channel_mix;
  channel_mix.place = {3, 3};
  CHECK(input_error_of([&] { channel_mix.validate(d_model, "mlp"); }) ==
        "mlp.layer_id is 3; it must be below n_layers = 3");
}
