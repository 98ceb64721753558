#include "models/language_model.h"

#include <cmath>

#include "autograd/tape.h"
#include "models/mixers/mamba2.h"
#include "tests/bound_parameters.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"
#include "train/yaml.h"

using namespace headwater;

namespace {

/// 2 layers, 13 tokens, every layer with an MLP.
LanguageModelConfig tiny_config() {
  LanguageModelConfig config;
  config.vocab_size = 13;
  config.d_model = 6;
  config.n_layers = 2;
  config.d_intermediate = 5;
  const auto mixer = std::make_shared<Mamba2Config>();
  mixer->d_state = 5;
  mixer->head_dim = 4;
  mixer->chunk_len = 8;
  config.mixer = mixer;
  return config;
}

/// i32 (batch, length) in [0, 13).
Tensor some_tokens(int64_t batch, int64_t length, const char* stream) {
  RandomStream random(5, stream);
  const Tensor tokens = Tensor::empty({batch, length}, DType::i32);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    tokens.data<int32_t>()[i] = static_cast<int32_t>(random.below(13));
  return tokens;
}

/// Initial values and some more, so that norms and skips are not 1, and embeddings are not so small that the
/// curvature of the norm behind them disturbs finite differences.
void fill(LanguageModel& model) {
  model.initialize(3);
  const Tensor& values = model.parameters().values();
  add_in_place(values, random_tensor(values.shape(), 77, 0.3).to(values.dtype()));
}

struct Step {
  double loss;
  std::vector<double> gradients;
};

Step train_step(LanguageModel& model, const LanguageModelOptions& options, const Tensor& resets = {}) {
  model.parameters().gradients().zero();
  Tape tape;
  const auto hidden = model.forward(some_tokens(2, 19, "tokens"), {}, resets, options);
  const LinearCrossEntropyOutput output = model.loss(hidden.hidden, some_tokens(2, 19, "targets"));
  tape.backward(output.loss);
  return {output.loss.value().to_vector<double>()[0], model.parameters().gradients().to_vector<double>()};
}

LanguageModelConfig read_config(const std::string& yaml) {
  LanguageModelConfig config;
  Options options;
  config.declare(options);
  options.read(parse_yaml(yaml, "model.yaml"), "model");
  return config;
}

std::string write_config(LanguageModelConfig config) {
  Options options;
  config.declare(options);
  return options.write();
}

}  // namespace

TEST_CASE("LanguageModel: published sizes have the published numbers of parameters") {
  const auto count = [](int64_t n_layers, int64_t d_model) {
    LanguageModelConfig config;
    config.vocab_size = 50288;
    config.d_model = d_model;
    config.n_layers = n_layers;
    return LanguageModel::count_parameters(config);
  };
  CHECK(count(24, 768) == 128989632);
  CHECK(count(48, 1024) == 368346624);
  CHECK(count(48, 1536) == 780161280);
  CHECK(count(48, 2048) == 1343757312);
  CHECK(count(64, 2560) == 2702599680);
  const LanguageModel model(tiny_config(), DType::f32);
  CHECK(LanguageModel::count_parameters(tiny_config()) == model.parameters().n_elements());
}

TEST_CASE("LanguageModel: the loss's gradient matches finite differences in every parameter") {
  for (const bool tied : {true, false}) {
    for (const bool recomputed : {false, true}) {
      INFO((tied ? "tied" : "untied") << (recomputed ? ", blocks recomputed" : ""));
      LanguageModelConfig config = tiny_config();
      config.tie_embeddings = tied;
      LanguageModel model(config, DType::f64);
      fill(model);
      const Tensor tokens = some_tokens(2, 11, "tokens"), targets = some_tokens(2, 11, "targets");
      targets.data<int32_t>()[4] = ignored_target;
      const Tensor resets = random_resets(2, 11, 0.2);
      const auto function = [&](const std::vector<Variable>& in) {
        const Variable zero = bind_parameters(model.parameters(), in);
        const auto hidden = model.forward(tokens, {}, resets, {.recompute_blocks = recomputed});
        return std::vector<Variable>{model.loss(hidden.hidden, targets).loss, zero};
      };
      // On a GPU, whole models are tested by training them: tests/train/trainer_cuda_test.cpp.
      CHECK(check_gradient(function, parameter_values(model.parameters()), 1e-6, cpu_only) == "");
    }
  }
}

TEST_CASE("LanguageModel: the loss is the mean negative log-likelihood under the logits") {
  LanguageModel model(tiny_config(), DType::f64);
  fill(model);
  const Tensor tokens = some_tokens(2, 7, "tokens"), targets = some_tokens(2, 7, "targets");
  const Variable hidden = model.forward(tokens, {}, {}).hidden;
  const std::vector<double> logits = model.logits(hidden).value().to_vector<double>();
  double sum = 0.0;
  for (int64_t row = 0; row < 14; ++row) {
    double normaliser = 0.0;
    for (int64_t v = 0; v < 13; ++v) normaliser += std::exp(logits[row * 13 + v]);
    sum += std::log(normaliser) - logits[row * 13 + targets.data<int32_t>()[row]];
  }
  CHECK(std::abs(model.loss(hidden, targets).loss.value().to_vector<double>()[0] - sum / 14) < 1e-12);
}

TEST_CASE("LanguageModel: recomputed blocks give the same loss and gradients, bit for bit") {
  for (const double drop_prob : {0.0, 0.3}) {
    LanguageModelConfig config = tiny_config();
    config.drop_prob = drop_prob;
    LanguageModel model(config, DType::f32);
    fill(model);
    const Tensor resets = random_resets(2, 19, 0.2);
    LanguageModelOptions options{.dropout_seed = 4, .dropout_offset = 2, .dropout = true};
    const Step kept = train_step(model, options, resets);
    options.recompute_blocks = true;
    const Step recomputed = train_step(model, options, resets);
    CHECK(kept.loss == recomputed.loss);
    CHECK(kept.gradients == recomputed.gradients);
  }
}

TEST_CASE("LanguageModel: a list of layers equals n_layers of the same mixer") {
  const LanguageModelConfig counted = tiny_config();
  LanguageModelConfig listed = tiny_config();
  listed.layers = {{counted.mixer, counted.d_intermediate, 2}};
  LanguageModel a(counted, DType::f32), b(listed, DType::f32);
  a.initialize(9);
  b.initialize(9);
  CHECK(a.parameters().values().to_vector<float>() == b.parameters().values().to_vector<float>());
  CHECK(train_step(a, {}).gradients == train_step(b, {}).gradients);
}

TEST_CASE("LanguageModel: layers may differ") {
  const LanguageModelConfig config = read_config(
      "vocab_size: 13\n"
      "d_model: 6\n"
      "layers:\n"
      "  - {mixer: {type: mamba2, head_dim: 4, d_state: 3}, repeat: 2}\n"
      "  - {mixer: {type: mamba2, head_dim: 6, d_state: 7}, d_intermediate: 9}\n");
  const std::vector<LayerConfig> layers = config.expanded_layers();
  REQUIRE(layers.size() == 3);
  CHECK(layers[1].d_intermediate == 0);
  CHECK(layers[2].d_intermediate == 9);
  LanguageModel model(config, DType::f32);
  fill(model);
  CHECK(model.parameters().find("backbone.layers.1.mixer.D")->shape == Shape{3});
  CHECK(model.parameters().find("backbone.layers.2.mixer.D")->shape == Shape{2});
  CHECK(model.parameters().find("backbone.layers.1.mlp.fc1.weight") == nullptr);
  CHECK(model.parameters().find("backbone.layers.2.mlp.fc1.weight")->shape == Shape{18, 6});
  CHECK(model.forward(some_tokens(1, 5, "tokens"), {}, {}).state.size() == 3);
}

TEST_CASE("LanguageModel: dropout is a function of seed and step, and off while evaluating") {
  LanguageModelConfig config = tiny_config();
  config.drop_prob = 0.4;
  LanguageModel model(config, DType::f32);
  fill(model);
  const auto loss = [&](const LanguageModelOptions& options) { return train_step(model, options).loss; };
  const LanguageModelOptions step{.dropout_seed = 1, .dropout_offset = 7, .dropout = true};
  const Step once = train_step(model, step), again = train_step(model, step);
  CHECK(once.loss == again.loss);
  CHECK(once.gradients == again.gradients);
  CHECK(loss(step) != loss({.dropout_seed = 1, .dropout_offset = 8, .dropout = true}));
  CHECK(loss(step) != loss({.dropout_seed = 2, .dropout_offset = 7, .dropout = true}));
  CHECK(loss({.dropout_seed = 1, .dropout_offset = 7}) == loss({}));
}

TEST_CASE("LanguageModel: a state handed over gives the outputs of the whole") {
  LanguageModel model(tiny_config(), DType::f64);
  fill(model);
  const Tensor tokens = some_tokens(2, 23, "tokens"), resets = random_resets(2, 23, 0.1);
  const Tensor whole = model.forward(tokens, {}, resets).hidden.value();
  LanguageModelState state;
  int64_t begin = 0;
  for (const int64_t end : {1, 2, 14, 23}) {
    INFO("steps " << begin << " to " << end);
    auto output = model.forward(steps_of(tokens, begin, end), state, steps_of(resets, begin, end));
    state = std::move(output.state);
    CHECK(relative_error(output.hidden.value(), steps_of(whole, begin, end)) < 1e-12);
    begin = end;
  }
  int64_t size = 0;
  for (const MixerState& layer : state) {
    for (const Variable& part : layer) size += part.value().numel();
  }
  CHECK(size == 2 * model.state_size());
  CHECK_THROWS_WITH(model.forward(tokens, LanguageModelState(1), {}), "the state has 1 layers, the model 2");
}

TEST_CASE("LanguageModel: the same seed gives the same model, another seed another") {
  const auto values = [](uint64_t seed) {
    LanguageModel model(tiny_config(), DType::f32);
    model.initialize(seed);
    return model.parameters().values().to_vector<float>();
  };
  CHECK(values(1) == values(1));
  CHECK(values(1) != values(2));
}

TEST_CASE("LanguageModel: options written are read back") {
  for (const char* yaml : {
           "vocab_size: 64\nmixer: {type: mamba2, headdim: 32, dt_limit: [0.1, null], d_ssm: 256}\n",
           "d_model: 32\nn_layers: 3\ndrop_prob: 0.25\ntie_embeddings: false\nd_intermediate: 7\n",
           "layers: [{mixer: {type: mamba2, d_state: 8}, repeat: 3}, {mixer: {type: mamba2}, d_intermediate: "
           "64}]\n",
       }) {
    INFO(yaml);
    const std::string written = write_config(read_config(yaml));
    CHECK(write_config(read_config(written)) == written);
  }
  const LanguageModelConfig config = read_config(
      "d_model: 32\nmixer: {type: mamba2, headdim: 16, chunk_size: 128, dt_limit: [0.01, null]}\n");
  const auto& mixer = dynamic_cast<const Mamba2Config&>(*config.mixer);
  CHECK(mixer.head_dim == 16);
  CHECK(mixer.chunk_len == 128);
  CHECK(mixer.dt_limit == std::array<std::optional<double>, 2>{0.01, std::nullopt});
}

TEST_CASE("LanguageModel: mistakes in the options are named with their place") {
  const auto error = [](const std::string& yaml) {
    return input_error_of([&] { read_config(yaml).validate("model"); });
  };
  CHECK(error("d_model: 8\nmixer:\n  type: mamba3\n") ==
        "model.yaml:3: model.mixer.type: 'mamba3' is not a mixer. Did you mean 'mamba2'? Known: mamba2, "
        "attention");
  CHECK(error("mixer: {d_state: 4}\n") == "model.yaml:1: model.mixer has no type; write type: mamba2");
  CHECK(error("mixer: mamba2\n") ==
        "model.yaml:1: model.mixer must be a map such as {type: mamba2, d_state: 64}");
  CHECK(error("layers: []\n") ==
        "model.yaml:1: model.layers must be a list such as [{mixer: {type: mamba2}, repeat: 4}]");
  CHECK(error("layers: [{repeat: 2}]\n") ==
        "model.yaml:1: model.layers.0 has no mixer; write mixer: {type: mamba2}");
  CHECK(error("d_model: 48\n") == "model.mixer.head_dim is 64; it must divide expand * d_model = 96");
  CHECK(error("d_model: 48\nlayers: [{mixer: {type: mamba2, head_dim: 32}}, {mixer: {type: mamba2}}]\n") ==
        "model.layers.1.mixer.head_dim is 64; it must divide expand * d_model = 96");
  CHECK_THAT(error("n_layers: 3\nlayers: [{mixer: {type: mamba2}}]\n"),
             ContainsSubstring("model.layers already lists every layer; give either of the two"));
  CHECK_THAT(error("mixer: {type: mamba2, d_sate: 4}\n"), ContainsSubstring("d_state"));
  CHECK_THROWS_WITH(LanguageModel(LanguageModelConfig(), DType::f32),
                    "model.vocab_size is not known; give it, or data that has a vocabulary");
}
