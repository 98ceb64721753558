#include "models/mixers/retention.h"

#include <cmath>

#include "autograd/tape.h"
#include "models/language_model.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/mixer_runs.h"
#include "tests/sequences.h"

using namespace headwater;

namespace {

constexpr int64_t d_model = 12;

struct NamedConfig {
  std::string name;
  RetentionConfig config;
};

/// Every option away from its default at least once. With the initial values r is small, and 1e-6 would be lost beside it.
std::vector<NamedConfig> option_sets() {
  RetentionConfig small;
  small.n_heads = 2;
  small.norm_epsilon = 1e-3;
  small.chunk_len = 8;
  std::vector<NamedConfig> sets{{"two heads", small}};
  const auto add = [&](const std::string& name, const std::function<void(RetentionConfig&)>& change) {
    sets.push_back({name, small});
    change(sets.back().config);
  };
  add("d_value, gelu", [](RetentionConfig& config) {
    config.n_heads = 3;
    config.d_value = 15;
    config.gate_fn = "gelu";
  });
  // A single pair of channels turns by one radian a step.
  add("pairs", [](RetentionConfig& config) {
    config.n_heads = 6;
    config.d_value = 6;
    config.norm_epsilon = 0.1;
  });
  return sets;
}

/// Sums of a few dozen f64 products in another order, relative to the largest number of a tensor; a norm enlarges them.
constexpr double reordering = 1e-11;

}  // namespace

TEST_CASE("retention: gradients of x, of all parameters and of the state match finite differences") {
  for (const NamedConfig& set : option_sets()) {
    for (const int64_t length : {1, 7, 19}) {
      INFO(set.name << ", length " << length);
      const Tensor resets = length == 19 ? random_resets(2, length, 0.2) : Tensor();
      CHECK(check_block_gradient(set.config, random_tensor({2, length, d_model}, 1), resets) == "");
    }
    const int64_t heads = *set.config.n_heads;
    const int64_t head_values = set.config.d_value.value_or(2 * d_model) / heads;
    const std::vector<Tensor> state{random_tensor({2, heads, d_model / heads, head_values}, 4, 0.1),
                                    Tensor::from_vector<int64_t>({2}, {3, 17})};
    CHECK(check_block_gradient(set.config, random_tensor({2, 11, d_model}, 2), {}, state) == "");
  }
}

TEST_CASE("retention: parallel, chunked, recurrent and step by step are one function") {
  const int64_t length = 37;
  const Tensor x = random_tensor({2, length, d_model}, 1);
  for (const bool with_documents : {false, true}) {
    const Tensor resets = with_documents ? random_resets(2, length, 0.15) : Tensor();
    for (const NamedConfig& set : option_sets()) {
      INFO(set.name << (with_documents ? ", documents" : ""));
      const auto run = [&](const std::string& form, int64_t chunk_len, const std::vector<int64_t>& borders) {
        RetentionConfig config = set.config;
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

TEST_CASE("retention: a state handed over gives the outputs and gradients of the whole") {
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

TEST_CASE("retention: a reset begins a document that nothing before it reaches, its positions included") {
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    CHECK(check_documents(set.config, random_tensor({1, 21, d_model}, 1), {0, 4, 5, 13}, reordering) == "");
  }
}

TEST_CASE("retention: equals the definition, term by term") {
  RetentionConfig config = option_sets()[0].config;
  const TestMixer test(config, d_model);
  constexpr int64_t length = 9, heads = 2, d_key = 6, head_values = 12, d_value = 24;
  const Tensor x = random_tensor({1, length, d_model}, 1);
  const auto project = [&](const std::string& name, const std::vector<double>& in, int64_t columns) {
    const std::vector<double> weight = test.store.find(name + ".weight")->value.to_vector<double>();
    const int64_t rows = static_cast<int64_t>(weight.size()) / columns;
    std::vector<double> out(length * rows);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j)
          out[t * rows + i] += weight[i * columns + j] * in[t * columns + j];
      }
    }
    return out;
  };
  const std::vector<double> in = x.to_vector<double>();
  const std::vector<double> q = project("q_proj", in, d_model), k = project("k_proj", in, d_model);
  const std::vector<double> v = project("v_proj", in, d_model), g = project("g_proj", in, d_model);
  std::vector<double> gated(length * d_value);
  for (int64_t h = 0; h < heads; ++h) {
    const double gamma = 1.0 - std::pow(2.0, -5.0 - static_cast<double>(h));
    for (int64_t t = 0; t < length; ++t) {
      std::vector<double> r(head_values);
      double ones = 0.0, squares = 0.0;
      for (int64_t s = 0; s <= t; ++s) {
        const double decay = std::pow(gamma, static_cast<double>(t - s));
        double score = 0.0;
        for (int64_t j = 0; j < d_key / 2; ++j) {
          // The product of two pairs, turned by the difference of their positions.
          const double* a = &q[t * d_model + h * d_key + 2 * j];
          const double* b = &k[s * d_model + h * d_key + 2 * j];
          const double angle =
              static_cast<double>(t - s) * std::pow(10000.0, -static_cast<double>(j) / (d_key / 2 - 1));
          score +=
              (a[0] * b[0] + a[1] * b[1]) * std::cos(angle) - (a[1] * b[0] - a[0] * b[1]) * std::sin(angle);
        }
        for (int64_t p = 0; p < head_values; ++p)
          r[p] += decay * score / std::sqrt(6.0) * v[s * d_value + h * head_values + p];
        ones += decay;
      }
      for (const double value : r) squares += value * value / head_values;
      for (int64_t p = 0; p < head_values; ++p) {
        const double gate = g[t * d_value + h * head_values + p];
        gated[t * d_value + h * head_values + p] =
            gate / (1.0 + std::exp(-gate)) * r[p] / std::sqrt(squares + config.norm_epsilon * ones);
      }
    }
  }
  const Tensor expected =
      Tensor::from_vector<double>({1, length, d_model}, project("out_proj", gated, d_value));
  CHECK(relative_error(test.mixer->forward(Variable(x), {}, {}).y.value(), expected) < 1e-12);
}

TEST_CASE("retention: f32 agrees with f64") {
  const Tensor x = random_tensor({2, 65, d_model}, 1);
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer exact(set.config, d_model), rounded(set.config, d_model, DType::f32);
    const Tensor y = rounded.mixer->forward(Variable(x.to(DType::f32)), {}, {}).y.value();
    // Rounding of inputs, parameters and a few hundred operations: some ten units of 2^-24, enlarged by the norm.
    CHECK(relative_error(y, exact.mixer->forward(Variable(x), {}, {}).y.value()) < 100 * 6e-8);
  }
}

TEST_CASE("retention: parameters have the names and shapes of the authors', and their initial values") {
  RetentionConfig config;
  config.d_value = 36;
  const TestMixer test(config, d_model);
  std::string text;
  for (const Parameter& parameter : test.store.parameters()) {
    text += fmt::format("{} {}\n", parameter.name, parameter.shape.str());
    const double gain = parameter.name == "out_proj.weight" ? 0.5 : std::pow(2.0, -2.5);
    const double bound = gain * std::sqrt(6.0 / static_cast<double>(parameter.shape[0] + parameter.shape[1]));
    double largest = 0.0;
    for (const double value : parameter.value.to_vector<double>())
      largest = std::max(largest, std::abs(value));
    CHECK(largest <= bound);
    CHECK(largest > 0.9 * bound);
    CHECK(parameter.attributes.weight_decay);
  }
  CHECK(text ==
        "q_proj.weight (12, 12)\n"
        "k_proj.weight (12, 12)\n"
        "v_proj.weight (36, 12)\n"
        "g_proj.weight (36, 12)\n"
        "out_proj.weight (12, 36)\n");
}

TEST_CASE("retention: the state is what state_size says") {
  for (const NamedConfig& set : option_sets()) {
    INFO(set.name);
    const TestMixer test(set.config, d_model);
    const MixerState state = test.mixer->forward(Variable(random_tensor({3, 9, d_model}, 1)), {}, {}).state;
    int64_t size = 0;
    for (const Variable& part : state) size += part.value().numel();
    CHECK(size == 3 * test.mixer->state_size());
    CHECK(state[1].value().to_vector<int64_t>() == std::vector<int64_t>{9, 9, 9});
  }
  // d_model 512: two heads of 256 keys and 512 values.
  CHECK(RetentionConfig().make(512, 1)->state_size() == 2 * 256 * 512 + 1);
}

TEST_CASE("retention: blocks can be recomputed, the position among the state") {
  LanguageModelConfig config;
  config.vocab_size = 13;
  config.d_model = d_model;
  config.n_layers = 2;
  config.mixer = std::make_shared<RetentionConfig>(option_sets()[0].config);
  LanguageModel model(config, DType::f64);
  model.initialize(3);
  const auto gradients = [&](bool recomputed) {
    model.parameters().gradients().zero();
    const LanguageModelOptions options{.recompute_blocks = recomputed};
    const Tensor tokens = Tensor::from_vector<int32_t>({1, 5}, {1, 2, 3, 4, 5});
    Tape tape;
    const auto first = model.forward(tokens, {}, {}, options);
    const auto second = model.forward(tokens, first.state, {}, options);
    tape.backward(model.loss(second.hidden, tokens).loss);
    return model.parameters().gradients().clone();
  };
  // In f64 but for the order in which the two pieces' gradients are added.
  CHECK(relative_error(gradients(true), gradients(false)) < 1e-13);
}

TEST_CASE("retention: sizes that do not fit together are refused by name") {
  const auto error = [](int64_t width, const std::function<void(RetentionConfig&)>& change) {
    RetentionConfig config;
    change(config);
    return input_error_of([&] { config.validate(width, "model.mixer"); });
  };
  CHECK(error(24, [](RetentionConfig&) {}) == "(no error)");
  CHECK(error(24, [](RetentionConfig& config) { config.n_heads = 5; }) ==
        "model.mixer.n_heads is 5; it must divide d_model = 24");
  CHECK(error(24, [](RetentionConfig& config) { config.n_heads = 8; }) ==
        "model.mixer.n_heads is 8; d_model / n_heads = 3 must be even, as pairs of channels are rotated");
  CHECK(error(24, [](RetentionConfig& config) {
          config.n_heads = 3;
          config.d_value = 40;
        }) == "model.mixer.d_value is 40; it must be a multiple of n_heads = 3");
}
