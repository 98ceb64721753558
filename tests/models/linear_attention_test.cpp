#include "models/mixers/linear_attention.h"

#include <cmath>

#include "models/language_model.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/mixer_runs.h"
#include "tests/sequences.h"

using namespace headwater;

namespace {

constexpr int64_t d_model = 6;

struct NamedConfig {
  std::string name;
  LinearAttentionConfig config;
};

/// Every option away from its default at least once. A lone token's output is its value but for epsilon, and the gradients of its
/// query and key are of that size: too small to be compared, with the default. The recorded cases have that one.
std::vector<NamedConfig> option_sets() {
  LinearAttentionConfig small;
  small.n_heads = 2;
  small.epsilon = 0.1;
  small.chunk_len = 8;
  std::vector<NamedConfig> sets{{"elu", small}};
  const auto add = [&](const std::string& name, const std::function<void(LinearAttentionConfig&)>& change) {
    sets.push_back({name, small});
    change(sets.back().config);
  };
  add("widths, a large epsilon, no biases", [](LinearAttentionConfig& config) {
    config.d_keys = 5;
    config.d_values = 4;
    config.epsilon = 0.5;
    config.bias = false;
  });
  add("relu", [](LinearAttentionConfig& config) { config.feature_map = "relu"; });
  add("identity, the plain sum", [](LinearAttentionConfig& config) {
    config.feature_map = "identity";
    config.normalize = false;
  });
  return sets;
}

/// Sums of a few dozen f64 products in another order, relative to the largest number of a tensor.
constexpr double reordering = 1e-11;

}  // namespace

TEST_CASE("linear_attention: gradients of x, of all parameters and of the state match finite differences") {
  for (const NamedConfig& set : option_sets()) {
    for (const int64_t length : {1, 7, 19}) {
      INFO(set.name << ", length " << length);
      const Tensor resets = length == 19 ? random_resets(2, length, 0.2) : Tensor();
      CHECK(check_block_gradient(set.config, random_tensor({2, length, d_model}, 1), resets) == "");
    }
    // A state that a sequence has left: one of random numbers could make a normaliser 0.
    const MixerRun before = run_in_pieces(set.config, random_tensor({2, 5, d_model}, 3), {}, {0, 5}, false);
    CHECK(check_block_gradient(set.config, random_tensor({2, 11, d_model}, 2), {}, before.state) == "");
  }
}

TEST_CASE("linear_attention: not causal, gradients match finite differences") {
  for (NamedConfig& set : option_sets()) {
    set.config.causal = false;
    for (const int64_t length : {1, 7, 19}) {
      INFO(set.name << ", length " << length);
      CHECK(check_block_gradient(set.config, random_tensor({2, length, d_model}, 1), {}) == "");
    }
  }
}

TEST_CASE("linear_attention: parallel, chunked, recurrent and step by step are one function") {
  const int64_t length = 37;
  const Tensor x = random_tensor({2, length, d_model}, 1);
  for (const bool with_documents : {false, true}) {
    const Tensor resets = with_documents ? random_resets(2, length, 0.15) : Tensor();
    for (const NamedConfig& set : option_sets()) {
      INFO(set.name << (with_documents ? ", documents" : ""));
      const auto run = [&](const std::string& form, int64_t chunk_len, const std::vector<int64_t>& borders) {
        LinearAttentionConfig config = set.config;
        config.form = form;
        config.chunk_len = chunk_len;
        return run_in_pieces(config, x, resets, borders);
      };
      const MixerRun parallel = run("chunked", length, {0, length});
      CHECK(difference(run("chunked", 8, {0, length}), parallel, reordering) == "");
      CHECK(difference(run("chunked", 1, {0, length}), parallel, reordering) == "");
      CHECK(difference(run("recurrent", 8, {0, length}), parallel, reordering) == "");
      CHECK(difference(run("automatic", 8, every_step(length)), parallel, reordering) == "");
      CHECK(difference(run("recurrent", 8, {0, 1, 13, length - 1, length}), parallel, reordering) == "");
    }
  }
}

TEST_CASE("linear_attention: not causal, all forms are one function, and every token sees all") {
  const Tensor x = random_tensor({2, 37, d_model}, 1);
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const auto run = [&](const std::string& form, int64_t chunk_len) {
      LinearAttentionConfig config = set.config;
      config.causal = false;
      config.form = form;
      config.chunk_len = chunk_len;
      return run_in_pieces(config, x, {}, {0, 37});
    };
    const MixerRun parallel = run("chunked", 37);
    CHECK(parallel.state.empty());
    CHECK(difference(run("chunked", 8), parallel, reordering) == "");
    CHECK(difference(run("recurrent", 8), parallel, reordering) == "");
    // The last token sees the same either way.
    const MixerRun causal = run_in_pieces(set.config, x, {}, {0, 37});
    CHECK(relative_error(steps_of(parallel.y, 36, 37), steps_of(causal.y, 36, 37)) < reordering);
    CHECK(relative_error(steps_of(parallel.y, 0, 1), steps_of(causal.y, 0, 1)) > 1e-3);
  }
}

TEST_CASE("linear_attention: a state handed over gives the outputs and gradients of the whole") {
  const int64_t length = 29;
  const Tensor x = random_tensor({2, length, d_model}, 1), resets = random_resets(2, length, 0.1);
  for (const NamedConfig& set : option_sets()) {
    const MixerRun whole = run_in_pieces(set.config, x, resets, {0, length});
    for (const std::vector<int64_t>& borders :
         {std::vector<int64_t>{0, 1, length}, {0, 13, length}, {0, 2, 3, 16, length - 1, length}}) {
      INFO(set.name << ", " << borders.size() - 1 << " pieces");
      CHECK(difference(run_in_pieces(set.config, x, resets, borders), whole, reordering) == "");
    }
  }
}

TEST_CASE("linear_attention: a reset begins a document that nothing before it reaches") {
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    CHECK(check_documents(set.config, random_tensor({1, 21, d_model}, 1), {0, 4, 5, 13}, reordering) == "");
  }
}

TEST_CASE("linear_attention: one token's output is its value, but for epsilon") {
  LinearAttentionConfig config;
  config.epsilon = 0.0;
  const TestMixer test(config, d_model);
  const Tensor x = random_tensor({1, 1, d_model}, 1);
  const Variable y = test.mixer->forward(Variable(x), {}, {}).y;
  const auto apply = [&](const std::string& name, const std::vector<double>& in) {
    const std::vector<double> weight = test.store.find(name + ".weight")->value.to_vector<double>();
    std::vector<double> out = test.store.find(name + ".bias")->value.to_vector<double>();
    for (size_t i = 0; i < out.size(); ++i) {
      for (size_t j = 0; j < in.size(); ++j) out[i] += weight[i * in.size() + j] * in[j];
    }
    return out;
  };
  const std::vector<double> expected =
      apply("out_projection", apply("value_projection", x.to_vector<double>()));
  CHECK(relative_error(y.value(), Tensor::from_vector<double>({1, 1, d_model}, expected)) < 1e-14);
}

TEST_CASE("linear_attention: f32 agrees with f64") {
  const Tensor x = random_tensor({2, 65, d_model}, 1);
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer exact(set.config, d_model), rounded(set.config, d_model, DType::f32);
    const Tensor y = rounded.mixer->forward(Variable(x.to(DType::f32)), {}, {}).y.value();
    // Rounding of inputs, parameters and a few hundred operations: some ten units of 2^-24.
    CHECK(relative_error(y, exact.mixer->forward(Variable(x), {}, {}).y.value()) < 100 * 6e-8);
  }
}

TEST_CASE(
    "linear_attention: parameters have the names and shapes of the authors', and their initial values") {
  LinearAttentionConfig config = option_sets()[0].config;
  config.d_keys = 5;
  config.d_values = 4;
  const TestMixer test(config, d_model);
  std::string text;
  for (const Parameter& parameter : test.store.parameters()) {
    text += fmt::format("{} {}{}\n", parameter.name, parameter.shape.str(),
                        parameter.attributes.weight_decay ? "" : " no decay");
    const bool is_last = parameter.name.rfind("out_projection", 0) == 0;
    double largest = 0.0;
    for (const double value : parameter.value.to_vector<double>())
      largest = std::max(largest, std::abs(value));
    CHECK(largest <= 1.0 / std::sqrt(is_last ? 8.0 : 6.0));
    CHECK(largest > 0.5 / std::sqrt(is_last ? 8.0 : 6.0));
  }
  CHECK(text ==
        "query_projection.weight (10, 6)\n"
        "key_projection.weight (10, 6)\n"
        "value_projection.weight (8, 6)\n"
        "out_projection.weight (6, 8)\n"
        "query_projection.bias (10) no decay\n"
        "key_projection.bias (10) no decay\n"
        "value_projection.bias (8) no decay\n"
        "out_projection.bias (6) no decay\n");
}

TEST_CASE("linear_attention: the state is what state_size says") {
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer test(set.config, d_model);
    const MixerState state = test.mixer->forward(Variable(random_tensor({3, 9, d_model}, 1)), {}, {}).state;
    REQUIRE(state.size() == 1);
    CHECK(state[0].value().numel() == 3 * test.mixer->state_size());
  }
  CHECK(LinearAttentionConfig().make(256, 1)->state_size() == 4 * 64 * 65);
}

TEST_CASE("linear_attention: sizes and options that do not fit together are refused by name") {
  const auto error = [](int64_t width, const std::function<void(LinearAttentionConfig&)>& change) {
    LinearAttentionConfig config;
    change(config);
    return input_error_of([&] { config.validate(width, "model.mixer"); });
  };
  CHECK(error(24, [](LinearAttentionConfig&) {}) == "(no error)");
  CHECK(error(200, [](LinearAttentionConfig&) {}) ==
        "model.mixer.n_heads is 3; it must divide d_model = 200, or d_keys and d_values must both be given");
  CHECK(error(200, [](LinearAttentionConfig& config) { config.d_keys = config.d_values = 16; }) ==
        "(no error)");
  CHECK(error(24, [](LinearAttentionConfig& config) { config.feature_map = "identity"; }) ==
        "model.mixer.feature_map is identity; its weights have any sign and may add up to 0, so normalize "
        "must be false");
}

TEST_CASE("linear_attention: not causal, a state, documents and a language model are refused") {
  LinearAttentionConfig config;
  config.causal = false;
  const TestMixer test(config, d_model);
  const Variable x(random_tensor({2, 5, d_model}, 1));
  CHECK(input_error_of([&] { test.mixer->forward(x, {x}, {}); }) ==
        "linear_attention: a state was handed over, but with causal: false every token sees the whole "
        "sequence, which must be given at once");
  CHECK(input_error_of([&] {
          test.mixer->forward(x, {}, Tensor::zeros({2, 5}, DType::i32));
        }) ==
        "linear_attention: documents in a packed row need causal: true; with causal: false give every "
        "document a row of its own");
  LanguageModelConfig model;
  model.mixer = std::make_shared<LinearAttentionConfig>(config);
  CHECK(input_error_of([&] { model.validate("model"); }) ==
        "model.mixer: this linear_attention sees the tokens after the one it stands at, which a language "
        "model is to predict; set causal: true");
}
