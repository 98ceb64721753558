#include "models/language_model.h"

#include <cmath>

#include "autograd/tape.h"
#include "ops/dropout/dropout.h"
#include "ops/elementwise/elementwise.h"
#include "ops/embedding/embedding.h"
#include "ops/layer_norm/layer_norm.h"
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

void declare_mlp_option(Options& options, std::shared_ptr<MixerConfig>& mlp) {
  options.custom(
      "mlp", "a second mixer behind another norm, in the place of the MLP: its type and that type's options",
      [&mlp](const ConfigValue& value, const std::string& path) { mlp = read_mixer(value, path); },
      [&mlp] { return mlp ? write_mixer(mlp) : ""; });
}

/// Adds the keys of one layer to `options`.
void declare_layer(Options& options, LayerConfig& layer) {
  options.custom(
      "mixer", "the sequence mixer: its type and that type's options",
      [&layer](const ConfigValue& value, const std::string& path) { layer.mixer = read_mixer(value, path); },
      [&layer] { return write_mixer(layer.mixer); });
  declare_mlp_option(options, layer.mlp);
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
  options.text("norm", &norm, "what stands before each mixer and MLP, and before the head")
      .one_of({"rms_norm", "layer_norm"});
  options
      .real("norm_epsilon", &norm_epsilon,
            "added to the mean square in RMSNorm, to the variance in LayerNorm")
      .above(0);
  options.boolean("norm_embeddings", &norm_embeddings, "a norm right behind the embedding too");
  options
      .optional_real("embedding_range", &embedding_range,
                     "start the embedding uniform on [-embedding_range, embedding_range]; null: normal, with "
                     "deviation 0.02")
      .above(0);
  options.real("drop_prob", &drop_prob, "dropout on the embedding and on each block's output, in training")
      .at_least(0)
      .below(1);
  options.integer("d_intermediate", &d_intermediate, "hidden width of a gated MLP after each mixer; 0: none")
      .at_least(0);
  options.custom(
      "mixer", "the sequence mixer of every layer: its type and that type's options",
      [this](const ConfigValue& value, const std::string& path) { mixer = read_mixer(value, path); },
      [this] { return layers.empty() ? write_mixer(mixer) : ""; }, describe_mixers);
  declare_mlp_option(options, mlp);
  options.custom(
      "layers",
      "instead of mixer, mlp, n_layers and d_intermediate: a list of {mixer: {...}, mlp: {...}, "
      "d_intermediate: N, "
      "repeat: N}, so that layers may differ",
      [this](const ConfigValue& value, const std::string& path) { layers = read_layers(value, path); },
      [this] { return write_layers(layers); });
  const auto no_list = [this] { return layers.empty(); };
  for (const char* name : {"mixer", "mlp", "n_layers", "d_intermediate"}) {
    options.used_if(name, no_list, "model.layers already lists every layer; give either of the two");
  }
}

std::vector<LayerConfig> LanguageModelConfig::expanded_layers() const {
  if (layers.empty()) return std::vector<LayerConfig>(n_layers, {mixer, d_intermediate, 1, mlp});
  std::vector<LayerConfig> expanded;
  for (const LayerConfig& layer : layers) {
    for (int64_t i = 0; i < layer.repeat; ++i)
      expanded.push_back({layer.mixer, layer.d_intermediate, 1, layer.mlp});
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
  const auto validate_layer = [&](const LayerConfig& layer, const std::string& layer_path) {
    check_mixer(*layer.mixer, layer_path + ".mixer");
    if (layer.mlp == nullptr) return;
    check_mixer(*layer.mlp, layer_path + ".mlp");
    require(layer.d_intermediate == 0,
            "{}.d_intermediate is {}; beside mlp there is no gated MLP: give either of the two", layer_path,
            layer.d_intermediate);
  };
  if (layers.empty()) validate_layer({mixer, d_intermediate, 1, mlp}, path);
  for (size_t i = 0; i < layers.size(); ++i) validate_layer(layers[i], fmt::format("{}.layers.{}", path, i));
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
               config.embedding_range ? uniform_initializer(*config.embedding_range)
                                      : normal_initializer(embedding_deviation),
               matrix);
  if (config.norm_embeddings) declare_norm(backbone.child("norm_embeddings"), embedding_norm_);
  const auto n_layers = static_cast<int64_t>(layers.size());
  for (int64_t i = 0; i < n_layers; ++i) add_layer(layers[static_cast<size_t>(i)], i, n_layers);
  declare_norm(backbone.child("norm_f"), final_norm_);
  if (!config.tie_embeddings) {
    store_.add("lm_head.weight", &head_weight_, {vocab_size(), config.d_model},
               normal_initializer(embedding_deviation), matrix);
  }
}

void LanguageModel::declare_norm(const ParameterScope& scope, Norm& norm) const {
  scope.add("weight", &norm.weight, {config_.d_model}, constant_initializer(1.0), no_weight_decay);
  if (config_.norm == "layer_norm")
    scope.add("bias", &norm.bias, {config_.d_model}, constant_initializer(0.0), no_weight_decay);
}

Variable LanguageModel::apply_norm(const Norm& norm, const Variable& x, DType output_dtype) const {
  if (config_.norm == "layer_norm")
    return cast(layer_norm(x, norm.weight, norm.bias, config_.norm_epsilon), output_dtype);
  return rms_norm(x, norm.weight, {}, {.epsilon = config_.norm_epsilon, .output_dtype = output_dtype});
}

void LanguageModel::add_layer(const LayerConfig& layer, int64_t index, int64_t n_layers) {
  const ParameterScope scope(store_, fmt::format("backbone.layers.{}", index));
  const auto add_block = [&](const MixerConfig& mixer, const char* norm_name, const char* mixer_name) {
    blocks_.push_back(std::make_unique<Block>());
    Block& block = *blocks_.back();
    block.mixer = mixer.make_layer(config_.d_model, n_layers, index);
    declare_norm(scope.child(norm_name), block.norm);
    block.mixer->declare_parameters(scope.child(mixer_name));
  };
  add_block(*layer.mixer, "norm", "mixer");
  blocks_.back()->d_intermediate = layer.d_intermediate;
  if (layer.d_intermediate > 0) declare_mlp(*blocks_.back(), scope, n_layers);
  if (layer.mlp != nullptr) add_block(*layer.mlp, "norm2", "mlp");
}

void LanguageModel::declare_mlp(Block& block, const ParameterScope& scope, int64_t n_layers) {
  const int64_t d_model = config_.d_model, width = block.d_intermediate;
  declare_norm(scope.child("norm2"), block.norm2);
  scope.add("mlp.fc1.weight", &block.fc1_weight, {2 * width, d_model},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(d_model))), matrix);
  scope.add("mlp.fc2.weight", &block.fc2_weight, {d_model, width},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(width * n_layers))), matrix);
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
  MixerOutput mixed = block.mixer->forward(apply_norm(block.norm, x, dtype_), state, resets);
  Variable y = add(x, drop(mixed.y, 2 * index, options));
  if (block.d_intermediate > 0) {
    const int64_t width = block.d_intermediate;
    const Variable normed = apply_norm(block.norm2, y, dtype_);
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
  require(state.empty() || state.size() == blocks_.size(), "the state is that of {} mixers, the model has {}",
          state.size(), blocks_.size());
  const Tensor resets_here = resets.to(device());
  Variable x = embedding(tokens.to(device()), embeddings_, {.output_dtype = compute_dtype(dtype_)});
  if (config_.norm_embeddings) x = apply_norm(embedding_norm_, x, x.dtype());
  x = drop(x, -1, options);
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
  return {apply_norm(final_norm_, x, dtype_), std::move(state_out)};
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
