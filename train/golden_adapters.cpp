// How each target of the golden files is computed here. One line per operator in `adapters`, below; mixers need
// none.

#include <algorithm>

#include "autograd/parameters.h"
#include "core/config_scalar.h"
#include "core/error.h"
#include "core/options.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/elementwise/elementwise.h"
#include "ops/rearrange/rearrange.h"
#include "ops/selective_scan/selective_scan.h"
#include "ops/ssd/ssd.h"
#include "train/golden.h"

namespace headwater {
namespace {

using Forms = std::variant<std::vector<GoldenForm>, Unsupported>;
using Feed = GoldenForm::Feed;

/// Feeding by pieces and by steps: for every target that carries a state.
void append_fed_forms(std::vector<GoldenForm>& forms) {
  forms.push_back({.name = "pieces", .feed = Feed::pieces});
  forms.push_back({.name = "steps", .feed = Feed::steps});
  forms.push_back({.name = "decode", .feed = Feed::steps, .with_gradients = false});
}

std::vector<GoldenForm> plain_forms() {
  std::vector<GoldenForm> forms{{.name = "whole"}};
  append_fed_forms(forms);
  return forms;
}

/// The forms of a chunked engine; in the parallel one a single chunk spans the sequence. What is not causal cannot be fed
/// in pieces.
std::vector<GoldenForm> chunked_forms(int64_t length, bool is_causal = true) {
  std::vector<GoldenForm> forms{
      {.name = "chunked", .engine = "chunked"},
      {.name = "chunked 1", .engine = "chunked", .chunk_len = 1},
      {.name = "chunked 16", .engine = "chunked", .chunk_len = 16},
      {.name = "parallel", .engine = "chunked", .chunk_len = length},
      {.name = "recurrent", .engine = "recurrent"},
  };
  if (is_causal) append_fed_forms(forms);
  return forms;
}

MatrixStateOptions engine_options(const GoldenForm& form, int64_t file_chunk_len) {
  const auto engine = form.engine == "chunked"     ? MatrixStateForm::chunked
                      : form.engine == "recurrent" ? MatrixStateForm::recurrent
                                                   : MatrixStateForm::automatic;
  return {.chunk_len = form.chunk_len.value_or(file_chunk_len), .form = engine};
}

/// The length of input `name`, whose time axis is 1.
int64_t length_of(const GoldenFile& golden, const std::string& name) {
  const Shape shape = golden.file.entry("input." + name).shape;
  require(shape.n_axes() >= 2, "{}: input.{} has shape {}; it must begin with (batch, length)",
          golden.path.string(), name, shape);
  return shape[1];
}

/// The parameters of an operator: all that the file has, as long as each is `known`.
NamedVariables operator_parameters(const GoldenFile& golden, const std::vector<std::string>& known,
                                   const Placement& placement) {
  NamedVariables parameters;
  for (const std::string& name : golden.names("param.")) {
    require(std::find(known.begin(), known.end(), name) != known.end(), "{}: {} has no parameter param.{}",
            golden.path.string(), golden.target, name);
    parameters[name] = Variable::leaf(golden.real("param." + name, placement));
  }
  return parameters;
}

/// The variable of that name; undefined if there is none.
Variable optional(const NamedVariables& variables, const std::string& name) {
  const auto found = variables.find(name);
  return found == variables.end() ? Variable() : found->second;
}

Variable transposed(const Variable& x) {
  return x.defined() ? transpose_last(x) : x;
}

// ---- op:causal_conv1d: the file has channels before time

GoldenCase make_causal_conv1d(const GoldenFile& golden, const GoldenForm&, const Placement& placement) {
  std::string activation = "silu";
  Options options;
  options.text("activation", &activation, "after the convolution").one_of({"silu", "none"});
  options.read(golden.config, "config");

  GoldenCase result;
  result.inputs = {{.name = "x", .time_axis = 2}};
  result.other_inputs = {"initial_states"};
  result.outputs = {{.name = "y", .time_axis = 2}};
  result.parameters = operator_parameters(golden, {"weight", "bias"}, placement);
  require(result.parameters.count("weight") == 1, "{}: param.weight is missing", golden.path.string());
  result.run = [silu = activation == "silu", parameters = result.parameters](
                   const NamedVariables& inputs, const MixerState& state, const Tensor& resets) {
    const Variable window = state.empty() ? transposed(optional(inputs, "initial_states")) : state[0];
    const CausalConv1dOutput output =
        causal_conv1d(transposed(inputs.at("x")), parameters.at("weight"), optional(parameters, "bias"),
                      window, resets, {.silu = silu});
    return GoldenCase::Output{{{"y", transposed(output.y)}}, {output.final_state}};
  };
  result.final_outputs = [](const MixerState& state) {
    return NamedVariables{{"final_states", transposed(state[0])}};
  };
  return result;
}

// ---- op:chunked_matrix_state

struct MatrixStateConfig {
  std::string decay;
  int64_t n_heads = 0, n_groups = 0, d_key = 0, d_value = 0;

  explicit MatrixStateConfig(const GoldenFile& golden) {
    Options options;
    options.text("decay", &decay, "its kind")
        .one_of({"none", "scalar_constant", "scalar_data", "vector_data", "scalar_data_complex",
                 "vector_data_complex"});
    options.integer("n_heads", &n_heads, "heads").at_least(1);
    options.integer("n_groups", &n_groups, "groups of heads that share q and k").at_least(1);
    options.integer("d_key", &d_key, "entries of q and k").at_least(1);
    options.integer("d_value", &d_value, "entries of v").at_least(1);
    options.read(golden.config, "config");
  }
};

Forms chunked_matrix_state_forms(const GoldenFile& golden) {
  const std::string decay = MatrixStateConfig(golden).decay;
  if (decay != "none" && decay != "scalar_constant" && decay != "scalar_data") {
    return Unsupported{fmt::format("decay {} is not built yet", decay)};
  }
  return chunked_forms(length_of(golden, "v"));
}

GoldenCase make_chunked_matrix_state(const GoldenFile& golden, const GoldenForm& form,
                                     const Placement& placement) {
  const MatrixStateConfig config(golden);
  const auto check_width = [&](const std::string& name, int64_t heads, int64_t width) {
    const Shape shape = golden.file.entry("input." + name).shape;
    require(shape.n_axes() == 4 && shape[2] == heads && shape[3] == width,
            "{}: input.{} has shape {}; by the file's config it must be (batch, length, {}, {})",
            golden.path.string(), name, shape, heads, width);
  };
  check_width("q", config.n_groups, config.d_key);
  check_width("k", config.n_groups, config.d_key);
  check_width("v", config.n_heads, config.d_value);

  GoldenCase result;
  result.inputs = {{.name = "q"}, {.name = "k"}, {.name = "v"}};
  result.other_inputs = {"initial_state"};
  if (config.decay == "scalar_data") result.inputs.push_back({.name = "log_decay"});
  if (config.decay == "scalar_constant") result.other_inputs.push_back("log_decay");
  result.outputs = {{.name = "y"}};
  result.parameters = operator_parameters(golden, {}, placement);
  result.run = [engine = engine_options(form, MatrixStateOptions().chunk_len)](
                   const NamedVariables& inputs, const MixerState& state, const Tensor& resets) {
    const MatrixStateOutput output =
        chunked_matrix_state({.q = inputs.at("q"),
                              .k = inputs.at("k"),
                              .v = inputs.at("v"),
                              .log_decay = optional(inputs, "log_decay"),
                              .value_scale = {},
                              .skip = {},
                              .initial_state = state.empty() ? optional(inputs, "initial_state") : state[0],
                              .resets = resets},
                             engine);
    return GoldenCase::Output{{{"y", output.y}}, {output.final_state}};
  };
  result.final_outputs = [](const MixerState& state) { return NamedVariables{{"final_state", state[0]}}; };
  return result;
}

// ---- op:ssd: the file's states are (batch, n_heads, head_dim, d_state), ours their transpose

Forms ssd_forms(const GoldenFile& golden) {
  return chunked_forms(length_of(golden, "x"));
}

GoldenCase make_ssd(const GoldenFile& golden, const GoldenForm& form, const Placement& placement) {
  int64_t chunk_len = MatrixStateOptions().chunk_len;
  StepSizeOptions step{.softplus = false};
  Options options;
  options.integer("chunk_len", &chunk_len, "steps per chunk").at_least(1).alias("chunk_size");
  options.boolean("dt_softplus", &step.softplus, "dt is given before softplus");
  options.limits("dt_limit", &step.limits, "clamp of dt");
  options.read(golden.config, "config");

  GoldenCase result;
  result.inputs = {
      {.name = "x"}, {.name = "dt"}, {.name = "B"}, {.name = "C"}, {.name = "z", .is_optional = true}};
  result.other_inputs = {"initial_states"};
  result.outputs = {{.name = "y"}};
  result.parameters = operator_parameters(golden, {"A", "D", "dt_bias"}, placement);
  require(result.parameters.count("A") == 1, "{}: param.A is missing", golden.path.string());
  result.run = [step, engine = engine_options(form, chunk_len), parameters = result.parameters](
                   const NamedVariables& inputs, const MixerState& state, const Tensor& resets) {
    const MatrixStateOutput output =
        ssd({.x = inputs.at("x"),
             .dt = inputs.at("dt"),
             .A = parameters.at("A"),
             .B = inputs.at("B"),
             .C = inputs.at("C"),
             .D = optional(parameters, "D"),
             .dt_bias = optional(parameters, "dt_bias"),
             .initial_state = state.empty() ? transposed(optional(inputs, "initial_states")) : state[0],
             .resets = resets},
            step, engine);
    const Variable z = optional(inputs, "z");
    return GoldenCase::Output{{{"y", z.defined() ? silu_mul(z, output.y) : output.y}}, {output.final_state}};
  };
  result.final_outputs = [](const MixerState& state) {
    return NamedVariables{{"final_states", transposed(state[0])}};
  };
  return result;
}

// ---- op:selective_scan: the file has channels before time

GoldenCase make_selective_scan(const GoldenFile& golden, const GoldenForm&, const Placement& placement) {
  SelectiveScanOptions scan{.softplus = false};
  Options options;
  options.boolean("delta_softplus", &scan.softplus, "delta is given before softplus");
  options.read(golden.config, "config");

  GoldenCase result;
  result.inputs = {{.name = "u", .time_axis = 2},
                   {.name = "delta", .time_axis = 2},
                   {.name = "B", .time_axis = 3},
                   {.name = "C", .time_axis = 3},
                   {.name = "z", .time_axis = 2, .is_optional = true}};
  result.outputs = {{.name = "y", .time_axis = 2}};
  result.parameters = operator_parameters(golden, {"A", "D", "delta_bias"}, placement);
  require(result.parameters.count("A") == 1, "{}: param.A is missing", golden.path.string());
  result.run = [scan, parameters = result.parameters](const NamedVariables& inputs, const MixerState& state,
                                                      const Tensor& resets) {
    // (batch, n_groups, d_state, length) to (batch, length, n_groups, d_state)
    const auto time_first = [](const Variable& map) {
      const int64_t batch = map.dim(0), n_groups = map.dim(1), d_state = map.dim(2), length = map.dim(3);
      return reshape(transpose_last(reshape(map, {batch, n_groups * d_state, length})),
                     {batch, length, n_groups, d_state});
    };
    const SelectiveScanOutput output = selective_scan({.x = transposed(inputs.at("u")),
                                                       .dt = transposed(inputs.at("delta")),
                                                       .A = parameters.at("A"),
                                                       .B = time_first(inputs.at("B")),
                                                       .C = time_first(inputs.at("C")),
                                                       .D = optional(parameters, "D"),
                                                       .z = transposed(optional(inputs, "z")),
                                                       .dt_bias = optional(parameters, "delta_bias"),
                                                       .initial_state = state.empty() ? Variable() : state[0],
                                                       .resets = resets},
                                                      scan);
    return GoldenCase::Output{{{"y", transposed(output.y)}}, {output.final_state}};
  };
  result.final_outputs = [](const MixerState& state) { return NamedVariables{{"last_state", state[0]}}; };
  return result;
}

// ---- mixer:TYPE, for every registered mixer

/// A mixer's options as the file has them: d_model stands among them.
struct MixerOptions {
  MixerOptions(const GoldenFile& golden, const GoldenForm& form)
      : config(make_mixer_config(golden.target.substr(golden.target.find(':') + 1))) {
    options.integer("d_model", &d_model, "width").at_least(1).at_most(1 << 20);
    config->declare(options);
    options.read(golden.config, "config");
    require(d_model > 0, "{}: metadata 'config' has no d_model", golden.path.string());
    ConfigValue changes;
    changes.kind = ConfigValue::Kind::map;
    const auto change = [&](const char* name, const std::string& text) {
      ConfigValue value;
      value.kind = ConfigValue::Kind::scalar;
      value.text = text;
      if (has(name)) changes.entries.emplace_back(name, value);
    };
    change("form", form.engine);
    if (form.chunk_len) change("chunk_len", std::to_string(*form.chunk_len));
    options.read(changes, "form");
    config->validate(d_model, "config");
  }

  bool has(const std::string& name) const {
    const std::vector<OptionDescription> list = options.list();
    return std::any_of(list.begin(), list.end(),
                       [&](const OptionDescription& option) { return option.path == name; });
  }

  int64_t d_model = 0;
  std::shared_ptr<MixerConfig> config;
  Options options;
};

Forms mixer_forms(const GoldenFile& golden) {
  const MixerOptions options(golden, {});
  const bool is_causal = options.config->is_causal();
  if (options.has("chunk_len")) return chunked_forms(length_of(golden, "x"), is_causal);
  return is_causal ? plain_forms() : std::vector<GoldenForm>{{.name = "whole"}};
}

/// The file must have the declared parameters and no others; the error lists every difference.
void check_parameters(const GoldenFile& golden, const ParameterStore& store) {
  std::string mistakes;
  const auto note = [&](const std::string& text) { mistakes += (mistakes.empty() ? "" : "; ") + text; };
  for (const Parameter& parameter : store.parameters()) {
    const std::string name = "param." + parameter.name;
    if (!golden.contains(name)) {
      note(name + " is missing");
    } else if (const Shape shape = golden.file.entry(name).shape; shape != parameter.shape) {
      note(fmt::format("{} has shape {}, the mixer needs {}", name, shape, parameter.shape));
    }
  }
  for (const std::string& name : golden.names("param.")) {
    if (store.find(name) == nullptr) note("param." + name + " is not a parameter of the mixer");
  }
  require(mistakes.empty(), "{}: {}", golden.path.string(), mistakes);
}

GoldenCase make_mixer(const GoldenFile& golden, const GoldenForm& form, const Placement& placement) {
  const MixerOptions options(golden, form);
  const std::shared_ptr<Mixer> mixer = options.config->make(options.d_model, /*n_layers=*/1);
  const auto store = std::make_shared<ParameterStore>();
  mixer->declare_parameters(ParameterScope(*store, ""));
  check_parameters(golden, *store);
  store->allocate(placement.dtype, placement.device);

  GoldenCase result;
  result.inputs = {{.name = "x"}};
  result.outputs = {{.name = "y"}};
  for (const Parameter& parameter : store->parameters()) {
    parameter.value.copy_from(golden.real("param." + parameter.name, placement));
    result.parameters[parameter.name] = *parameter.variable;
  }
  // The store keeps the buffers, the mixer its views on them.
  result.run = [mixer, store](const NamedVariables& inputs, const MixerState& state, const Tensor& resets) {
    const MixerOutput output = mixer->forward(inputs.at("x"), state, resets);
    return GoldenCase::Output{{{"y", output.y}}, output.state};
  };
  result.final_outputs = [mixer](const MixerState& state) { return mixer->published_state(state); };
  return result;
}

std::vector<GoldenAdapter> all_adapters() {
  std::vector<GoldenAdapter> adapters = {
      {"op:causal_conv1d", [](const GoldenFile&) { return Forms(plain_forms()); }, make_causal_conv1d},
      {"op:chunked_matrix_state", chunked_matrix_state_forms, make_chunked_matrix_state},
      {"op:selective_scan", [](const GoldenFile&) { return Forms(plain_forms()); }, make_selective_scan},
      {"op:ssd", ssd_forms, make_ssd},
  };
  for (const std::string& type : mixer_types())
    adapters.push_back({"mixer:" + type, mixer_forms, make_mixer});
  return adapters;
}

}  // namespace

const GoldenAdapter* find_golden_adapter(const std::string& target) {
  static const std::vector<GoldenAdapter> adapters = all_adapters();
  for (const GoldenAdapter& adapter : adapters) {
    if (adapter.target == target) return &adapter;
  }
  return nullptr;
}

}  // namespace headwater
