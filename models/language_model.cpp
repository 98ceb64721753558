#include "models/language_model.h"

#include <cmath>

#include "autograd/tape.h"
#include "ops/dropout/dropout.h"
#include "ops/elementwise/elementwise.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/linear.h"
#include "ops/rms_norm/rms_norm.h"

namespace headwater {
namespace {

constexpr double embedding_deviation = 0.02;
constexpr int64_t max_layers = 10000;

/// The options of one mixer, `type` among them.
struct MixerChoice {
  explicit MixerChoice(std::shared_ptr<MixerConfig> chosen)
      : config(std::move(chosen)), type(config->type()) {
    options.text("type", &type, "the family").one_of(mixer_types());
    config->declare(options);
  }

  std::shared_ptr<MixerConfig> config;
  std::string type;
  Options options;
};

std::shared_ptr<MixerConfig> read_mixer(const ConfigValue& value, const std::string& path) {
  require(value.kind == ConfigValue::Kind::map, "{}: {} must be a map such as {{type: mamba2, d_state: 64}}",
          value.where(), path);
  const ConfigValue* type = value.find("type");
  require(type != nullptr && type->kind == ConfigValue::Kind::scalar, "{}: {} has no type; write type: {}",
          value.where(), path, mixer_types().front());
  std::shared_ptr<MixerConfig> config;
  try {
    config = make_mixer_config(type->text);
  } catch (const Error& error) {
    throw_input_error("{}: {}.type: {}", type->where(), path, error.what());
  }
  MixerChoice choice(config);
  choice.options.read(value, path);
  return config;
}

std::string write_mixer(const std::shared_ptr<MixerConfig>& mixer) {
  return MixerChoice(mixer).options.write_flow();
}

std::string describe_mixers() {
  std::string text;
  for (const std::string& type : mixer_types()) {
    text += fmt::format("mixer {}:\n{}", type, MixerChoice(make_mixer_config(type)).options.describe());
  }
  return text;
}

/// Adds the keys of one layer to `options`.
void declare_layer(Options& options, LayerConfig& layer) {
  options.custom(
      "mixer", "the sequence mixer: its type and that type's options",
      [&layer](const ConfigValue& value, const std::string& path) { layer.mixer = read_mixer(value, path); },
      [&layer] { return write_mixer(layer.mixer); });
  options
      .integer("d_intermediate", &layer.d_intermediate,
               "hidden width of a gated MLP after the mixer; 0: none")
      .at_least(0);
  options.integer("repeat", &layer.repeat, "so many equal layers in a row").at_least(1).at_most(max_layers);
}

std::vector<LayerConfig> read_layers(const ConfigValue& value, const std::string& path) {
  require(value.kind == ConfigValue::Kind::sequence && !value.items.empty(),
          "{}: {} must be a list such as [{{mixer: {{type: mamba2}}, repeat: 4}}]", value.where(), path);
  std::vector<LayerConfig> layers;
  for (size_t i = 0; i < value.items.size(); ++i) {
    const std::string item_path = fmt::format("{}.{}", path, i);
    LayerConfig layer;
    Options options;
    declare_layer(options, layer);
    options.read(value.items[i], item_path);
    require(layer.mixer != nullptr, "{}: {} has no mixer; write mixer: {{type: mamba2}}",
            value.items[i].where(), item_path);
    layers.push_back(layer);
  }
  return layers;
}

std::string write_layers(const std::vector<LayerConfig>& layers) {
  std::string text;
  for (LayerConfig layer : layers) {
    Options options;
    declare_layer(options, layer);
    text += (text.empty() ? "" : ", ") + options.write_flow();
  }
  return text.empty() ? "" : "[" + text + "]";
}

}  // namespace

LanguageModelConfig::LanguageModelConfig() : mixer(make_mixer_config("mamba2")) {}

void LanguageModelConfig::declare(Options& options) {
  options
      .optional_integer("vocab_size", &vocab_size,
                        "rows of the embedding; null: the tokenizer's tokens, rounded up to a multiple of 16")
      .at_least(2)
      .at_most(1 << 24);
  options.integer("d_model", &d_model, "width of the residual stream").at_least(1).at_most(1 << 20);
  options.integer("n_layers", &n_layers, "number of blocks").at_least(1).at_most(max_layers);
  options.boolean("tie_embeddings", &tie_embeddings, "the head shares the embedding's weight");
  options.real("norm_epsilon", &norm_epsilon, "added to the mean square in RMSNorm").above(0);
  options.real("drop_prob", &drop_prob, "dropout on the embedding and on each block's output, in training")
      .at_least(0)
      .below(1);
  options.integer("d_intermediate", &d_intermediate, "hidden width of a gated MLP after each mixer; 0: none")
      .at_least(0);
  options.custom(
      "mixer", "the sequence mixer of every layer: its type and that type's options",
      [this](const ConfigValue& value, const std::string& path) { mixer = read_mixer(value, path); },
      [this] { return layers.empty() ? write_mixer(mixer) : ""; }, describe_mixers);
  options.custom(
      "layers",
      "instead of mixer, n_layers and d_intermediate: a list of {mixer: {...}, d_intermediate: N, repeat: "
      "N}, so that "
      "layers may differ",
      [this](const ConfigValue& value, const std::string& path) { layers = read_layers(value, path); },
      [this] { return write_layers(layers); });
  const auto no_list = [this] { return layers.empty(); };
  for (const char* name : {"mixer", "n_layers", "d_intermediate"}) {
    options.used_if(name, no_list, "model.layers already lists every layer; give either of the two");
  }
}

std::vector<LayerConfig> LanguageModelConfig::expanded_layers() const {
  if (layers.empty()) return std::vector<LayerConfig>(n_layers, {mixer, d_intermediate, 1});
  std::vector<LayerConfig> expanded;
  for (const LayerConfig& layer : layers) {
    for (int64_t i = 0; i < layer.repeat; ++i) expanded.push_back({layer.mixer, layer.d_intermediate, 1});
  }
  return expanded;
}

void LanguageModelConfig::validate(const std::string& path) const {
  const auto check_mixer = [this](const MixerConfig& config, const std::string& where) {
    config.validate(d_model, where);
    require(config.is_causal(),
            "{}: this {} sees the tokens after the one it stands at, which a language model is to predict; "
            "set causal: true",
            where, config.type());
  };
  if (layers.empty()) {
    check_mixer(*mixer, path + ".mixer");
    return;
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    check_mixer(*layers[i].mixer, fmt::format("{}.layers.{}.mixer", path, i));
  }
}

LanguageModel::LanguageModel(const LanguageModelConfig& config, DType dtype, Device device)
    : LanguageModel(config) {
  dtype_ = dtype;
  store_.allocate(dtype, device);
}

int64_t LanguageModel::count_parameters(const LanguageModelConfig& config) {
  return LanguageModel(config).store_.n_elements();
}

LanguageModel::LanguageModel(const LanguageModelConfig& config) : config_(config) {
  require(config.vocab_size.has_value(),
          "model.vocab_size is not known; give it, or data that has a vocabulary");
  config.validate("model");
  const std::vector<LayerConfig> layers = config.expanded_layers();
  const ParameterScope backbone(store_, "backbone");
  backbone.add("embeddings.weight", &embeddings_, {vocab_size(), config.d_model},
               normal_initializer(embedding_deviation), matrix);
  for (size_t i = 0; i < layers.size(); ++i) {
    blocks_.push_back(std::make_unique<Block>());
    blocks_.back()->mixer = layers[i].mixer->make(config.d_model, static_cast<int64_t>(layers.size()));
    blocks_.back()->d_intermediate = layers[i].d_intermediate;
    declare_block(*blocks_.back(), static_cast<int64_t>(i));
  }
  backbone.add("norm_f.weight", &final_norm_weight_, {config.d_model}, constant_initializer(1.0),
               no_weight_decay);
  if (!config.tie_embeddings) {
    store_.add("lm_head.weight", &head_weight_, {vocab_size(), config.d_model},
               normal_initializer(embedding_deviation), matrix);
  }
}

void LanguageModel::declare_block(Block& block, int64_t index) {
  const int64_t d_model = config_.d_model, width = block.d_intermediate;
  const double n_layers = static_cast<double>(config_.expanded_layers().size());
  const ParameterScope scope(store_, fmt::format("backbone.layers.{}", index));
  scope.add("norm.weight", &block.norm_weight, {d_model}, constant_initializer(1.0), no_weight_decay);
  block.mixer->declare_parameters(scope.child("mixer"));
  if (width == 0) return;
  scope.add("norm2.weight", &block.norm2_weight, {d_model}, constant_initializer(1.0), no_weight_decay);
  scope.add("mlp.fc1.weight", &block.fc1_weight, {2 * width, d_model},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(d_model))), matrix);
  scope.add("mlp.fc2.weight", &block.fc2_weight, {d_model, width},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(width) * n_layers)), matrix);
}

Variable LanguageModel::drop(const Variable& x, int64_t place, const LanguageModelOptions& options) const {
  if (!options.dropout || config_.drop_prob == 0.0) return x;
  const uint64_t stream = stream_id(fmt::format("dropout.{}", place));
  // Steps are 2^32 counters apart: more than a tensor of one step uses.
  return dropout(x, config_.drop_prob, {options.dropout_seed, stream, options.dropout_offset << 32});
}

MixerOutput LanguageModel::run_block(const Block& block, int64_t index, const Variable& x,
                                     const MixerState& state, const Tensor& resets,
                                     const LanguageModelOptions& options) const {
  const RmsNormOptions norm{.epsilon = config_.norm_epsilon, .output_dtype = dtype_};
  MixerOutput mixed = block.mixer->forward(rms_norm(x, block.norm_weight, {}, norm), state, resets);
  Variable y = add(x, drop(mixed.y, 2 * index, options));
  if (block.d_intermediate > 0) {
    const int64_t width = block.d_intermediate;
    const Variable normed = rms_norm(y, block.norm2_weight, {}, norm);
    const Variable up = linear(normed, block.fc1_weight.parameter_rows(0, width));
    const Variable gate = linear(normed, block.fc1_weight.parameter_rows(width, 2 * width));
    y = add(y, drop(linear(silu_mul(gate, up), block.fc2_weight), 2 * index + 1, options));
  }
  return {y, std::move(mixed.state)};
}

MixerOutput LanguageModel::recompute_block(const Block& block, int64_t index, const Variable& x,
                                           const MixerState& state, const Tensor& resets,
                                           const LanguageModelOptions& options) const {
  std::vector<Variable> inputs{x};
  inputs.insert(inputs.end(), state.begin(), state.end());
  const auto run = [this, &block, index, resets, options](const std::vector<Variable>& in) {
    const MixerOutput output =
        run_block(block, index, in[0], MixerState(in.begin() + 1, in.end()), resets, options);
    std::vector<Variable> outputs{output.y};
    outputs.insert(outputs.end(), output.state.begin(), output.state.end());
    return outputs;
  };
  const std::vector<Variable> outputs = recompute(run, inputs);
  return {outputs[0], MixerState(outputs.begin() + 1, outputs.end())};
}

LanguageModel::Hidden LanguageModel::forward(const Tensor& tokens, const LanguageModelState& state,
                                             const Tensor& resets,
                                             const LanguageModelOptions& options) const {
  require(state.empty() || state.size() == blocks_.size(), "the state has {} layers, the model {}",
          state.size(), blocks_.size());
  const Tensor resets_here = resets.to(device());
  Variable x =
      drop(embedding(tokens.to(device()), embeddings_, {.output_dtype = compute_dtype(dtype_)}), -1, options);
  LanguageModelState state_out;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const MixerState& state_in = state.empty() ? MixerState{} : state[i];
    const auto index = static_cast<int64_t>(i);
    MixerOutput output = options.recompute_blocks
                             ? recompute_block(*blocks_[i], index, x, state_in, resets_here, options)
                             : run_block(*blocks_[i], index, x, state_in, resets_here, options);
    x = output.y;
    state_out.push_back(std::move(output.state));
  }
  return {rms_norm(x, final_norm_weight_, {}, {.epsilon = config_.norm_epsilon, .output_dtype = dtype_}),
          std::move(state_out)};
}

Variable LanguageModel::logits(const Variable& hidden) const {
  return linear(hidden, head_weight());
}

LinearCrossEntropyOutput LanguageModel::loss(const Variable& hidden, const Tensor& targets,
                                             const LinearCrossEntropyOptions& options) const {
  return linear_cross_entropy(hidden, head_weight(), targets.to(device()), options);
}

int64_t LanguageModel::state_size() const {
  int64_t sum = 0;
  for (const auto& block : blocks_) sum += block->mixer->state_size();
  return sum;
}

double LanguageModel::flops_per_token() const {
  double flops = 0.0;
  for (const Parameter& parameter : store_.parameters()) {
    const bool is_lookup = parameter.variable == &embeddings_ && !config_.tie_embeddings;
    if (parameter.attributes.is_matrix && !is_lookup)
      flops += 2.0 * static_cast<double>(parameter.shape.numel());
  }
  for (const auto& block : blocks_) flops += block->mixer->flops_per_token();
  return flops;
}

}  // namespace headwater
