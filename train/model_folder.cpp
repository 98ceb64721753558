#include "train/model_folder.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/safetensors.h"
#include "models/mixers/mamba2.h"
#include "train/json.h"
#include "train/yaml.h"

namespace headwater {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t max_config_bytes = 1 << 20;
constexpr const char* own_record = "headwater_model";
// The other layout has one epsilon for the blocks' norms and the gated one; ours is fixed in the gated one.
constexpr double shared_norm_epsilon = 1e-5;

/// The config as YAML on one line.
std::string record_of(LanguageModelConfig config) {
  Options options;
  config.declare(options);
  return options.write_flow();
}

/// The options of the one mixer that all layers share, if the Hugging Face layout can express the model.
std::shared_ptr<const Mamba2Config> expressible_mixer(const LanguageModelConfig& config) {
  const std::vector<LayerConfig> layers = config.expanded_layers();
  const auto mixer = std::dynamic_pointer_cast<const Mamba2Config>(layers.front().mixer);
  const auto is_plain = [&](const LayerConfig& layer) {
    return layer.d_intermediate == 0 && layer.mlp == nullptr && layer.mixer == layers.front().mixer;
  };
  if (!mixer || !std::all_of(layers.begin(), layers.end(), is_plain)) return nullptr;
  const int64_t d_inner = mixer->expand * config.d_model;
  const bool expressible = mixer->d_ssm.value_or(d_inner) == d_inner && !mixer->D_has_hdim &&
                           mixer->rmsnorm && !mixer->norm_before_gate && !mixer->learnable_init_states &&
                           mixer->norm_groups.value_or(mixer->n_groups) == mixer->n_groups &&
                           config.norm == "rms_norm" && !config.norm_embeddings &&
                           config.norm_epsilon == shared_norm_epsilon;
  return expressible ? mixer : nullptr;
}

double limit_or(const std::optional<double>& limit, double open) {
  return limit.value_or(open);
}

Json hugging_face_config(const LanguageModelConfig& config, const Mamba2Config& mixer) {
  Json json;
  json["architectures"] = {"Mamba2ForCausalLM"};
  json["model_type"] = "mamba2";
  json["num_heads"] = mixer.expand * config.d_model / mixer.head_dim;
  json["head_dim"] = mixer.head_dim;
  json["vocab_size"] = *config.vocab_size;
  json["hidden_size"] = config.d_model;
  json["state_size"] = mixer.d_state;
  json["num_hidden_layers"] = config.expanded_layers().size();
  json["expand"] = mixer.expand;
  json["conv_kernel"] = mixer.d_conv;
  json["n_groups"] = mixer.n_groups;
  json["use_bias"] = mixer.bias;
  json["use_conv_bias"] = mixer.conv_bias;
  json["hidden_act"] = "silu";
  json["rms_norm"] = true;
  json["chunk_size"] = mixer.chunk_len;
  json["time_step_rank"] = "auto";
  json["time_step_min"] = mixer.dt_min;
  json["time_step_max"] = mixer.dt_max;
  json["time_step_floor"] = mixer.dt_init_floor;
  json["time_step_limit"] = {limit_or(mixer.dt_limit[0], 0.0), limit_or(mixer.dt_limit[1], INFINITY)};
  json["layer_norm_epsilon"] = config.norm_epsilon;
  json["norm_before_gate"] = false;
  json["residual_in_fp32"] = true;
  json["rescale_prenorm_residual"] = false;
  json["initializer_range"] = 0.1;
  json["tie_word_embeddings"] = config.tie_embeddings;
  json["use_cache"] = true;
  json["bos_token_id"] = json["eos_token_id"] = json["pad_token_id"] = 0;
  json["torch_dtype"] = "float32";
  return json;
}

/// JSON has no infinity; every published config writes it bare, as Python does. nlohmann-json writes null.
std::string with_bare_infinity(std::string text) {
  const size_t key = text.find("\"time_step_limit\"");
  if (key == std::string::npos) return text;
  const size_t end = text.find(']', key);
  const size_t open = text.find("null", key);
  if (open < end) text.replace(open, 4, "Infinity");
  return text;
}

/// Reads one key through its declaration, so that a bad value is refused in the usual words.
void read_one(Options& options, const std::string& key, const ConfigValue& value) {
  ConfigValue map;
  map.kind = ConfigValue::Kind::map;
  map.source = value.source;
  map.entries = {{key, value}};
  options.read(map, "");
}

template <class T>
T number_of(const ConfigValue& json, const std::string& key, T fallback) {
  const ConfigValue* value = json.find(key);
  if (value == nullptr || value->kind == ConfigValue::Kind::null) return fallback;
  T result{};
  Options options;
  if constexpr (std::is_same_v<T, int64_t>) {
    options.integer(key, &result, "").at_least(1);
  } else if constexpr (std::is_same_v<T, bool>) {
    options.boolean(key, &result, "");
  } else {
    options.real(key, &result, "").at_least(0);
  }
  read_one(options, key, *value);
  return result;
}

/// Keys and defaults of the transformers package's Mamba2Config.
LanguageModelConfig from_hugging_face(const ConfigValue& json) {
  LanguageModelConfig config;
  auto mixer = std::make_shared<Mamba2Config>();
  config.vocab_size = number_of<int64_t>(json, "vocab_size", 32768);
  config.d_model = number_of<int64_t>(json, "hidden_size", 4096);
  config.n_layers = number_of<int64_t>(json, "num_hidden_layers", 64);
  config.norm_epsilon = number_of(json, "layer_norm_epsilon", 1e-5);
  config.tie_embeddings = number_of(json, "tie_word_embeddings", false);
  mixer->d_state = number_of<int64_t>(json, "state_size", 128);
  mixer->head_dim = number_of<int64_t>(json, "head_dim", 64);
  mixer->expand = number_of<int64_t>(json, "expand", 2);
  mixer->d_conv = number_of<int64_t>(json, "conv_kernel", 4);
  mixer->n_groups = number_of<int64_t>(json, "n_groups", 8);
  mixer->bias = number_of(json, "use_bias", false);
  mixer->conv_bias = number_of(json, "use_conv_bias", true);
  mixer->dt_min = number_of(json, "time_step_min", 0.001);
  mixer->dt_max = number_of(json, "time_step_max", 0.1);
  mixer->dt_init_floor = number_of(json, "time_step_floor", 1e-4);
  const int64_t n_heads = number_of<int64_t>(json, "num_heads", 128);
  require(n_heads * mixer->head_dim == mixer->expand * config.d_model,
          "{}: num_heads * head_dim = {} * {} is not expand * hidden_size = {} * {}", json.source, n_heads,
          mixer->head_dim, mixer->expand, config.d_model);
  require(config.norm_epsilon == shared_norm_epsilon, "{}: layer_norm_epsilon is {}; only {} can be read",
          json.source, config.norm_epsilon, shared_norm_epsilon);
  require(number_of(json, "rms_norm", true),
          "{}: rms_norm is false; only models with the gated norm can be read", json.source);
  if (const ConfigValue* limit = json.find("time_step_limit")) {
    Options options;
    options.limits("time_step_limit", &mixer->dt_limit, "");
    read_one(options, "time_step_limit", *limit);
  }
  config.mixer = mixer;
  return config;
}

/// Names and shapes held against each other; one line per problem.
std::string weight_problems(const SafetensorsFile& file, const LanguageModel& model,
                            const std::function<std::string(const std::string&)>& stored_name) {
  std::string problems;
  std::vector<std::string> used;
  for (const Parameter& parameter : model.parameters().parameters()) {
    const std::string name = stored_name(parameter.name);
    if (!file.contains(name)) {
      problems += fmt::format("\n  {} is missing; the model needs {}", parameter.name, parameter.shape);
      continue;
    }
    used.push_back(name);
    const Shape& shape = file.entry(name).shape;
    if (shape != parameter.shape) {
      problems += fmt::format("\n  {} is {}, the model needs {}", name, shape, parameter.shape);
    }
  }
  for (const std::string& name : file.names()) {
    const bool tied_copy = name == "lm_head.weight" && model.config().tie_embeddings;
    if (!tied_copy && std::find(used.begin(), used.end(), name) == used.end()) {
      problems += fmt::format("\n  {} {} belongs to nothing in the model", name, file.entry(name).shape);
    }
  }
  return problems;
}

}  // namespace

void write_model(const Path& folder, const LanguageModel& model) {
  std::vector<NamedTensor> tensors;
  for (const Parameter& parameter : model.parameters().parameters()) {
    tensors.push_back({parameter.name, parameter.value});
  }
  write_safetensors(folder / weights_file, tensors, {{"format", "pt"}});
  const auto mixer = expressible_mixer(model.config());
  Json json = mixer ? hugging_face_config(model.config(), *mixer) : Json{{"model_type", "headwater"}};
  json[own_record] = record_of(model.config());
  write_file_atomically(folder / model_config_file, with_bare_infinity(json.dump(2)) + "\n");
}

LanguageModelConfig read_model_config(const Path& folder) {
  const Path path = folder / model_config_file;
  const ConfigValue json = parse_json(read_text_file(path, max_config_bytes), path.string());
  if (const ConfigValue* record = json.find(own_record)) {
    LanguageModelConfig config;
    Options options;
    config.declare(options);
    options.read(parse_yaml(record->text, path.string() + ": " + own_record), "model");
    return config;
  }
  const ConfigValue* type = json.find("model_type");
  require(type != nullptr && type->text == "mamba2",
          "{}: model_type is '{}'; expected mamba2, or a model written by headwater", path.string(),
          type != nullptr ? type->text : "");
  return from_hugging_face(json);
}

void read_weights(const Path& folder, LanguageModel& model) {
  const SafetensorsFile file = SafetensorsFile::open(folder / weights_file);
  // The authors' own files say "embedding" where Hugging Face's say "embeddings".
  const auto stored_name = [&](const std::string& name) -> std::string {
    const bool renamed = name == "backbone.embeddings.weight" && !file.contains(name);
    return renamed ? "backbone.embedding.weight" : name;
  };
  const std::string problems = weight_problems(file, model, stored_name);
  require(problems.empty(), "{} does not fit the model:{}", file.path().string(), problems);
  for (const Parameter& parameter : model.parameters().parameters()) {
    parameter.value.copy_from(file.tensor(stored_name(parameter.name)).to(parameter.value.dtype()));
  }
  model.parameters().renew_bf16_copy();
}

std::unique_ptr<LanguageModel> read_model(const Path& folder, DType dtype, Device device) {
  auto model = std::make_unique<LanguageModel>(read_model_config(folder), dtype, device);
  read_weights(folder, *model);
  return model;
}

}  // namespace headwater
