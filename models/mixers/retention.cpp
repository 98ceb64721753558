#include "models/mixers/retention.h"

#include <algorithm>
#include <cmath>

#include "autograd/tape.h"
#include "core/error.h"
#include "ops/elementwise/elementwise.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/rotate_pairs/rotate_pairs.h"

namespace headwater {
namespace {

constexpr int64_t default_head_width = 256;

MatrixStateForm parse_form(const std::string& form) {
  if (form == "chunked") return MatrixStateForm::chunked;
  if (form == "recurrent") return MatrixStateForm::recurrent;
  return MatrixStateForm::automatic;
}

int64_t heads_of(const RetentionConfig& config, int64_t d_model) {
  return config.n_heads.value_or(std::max<int64_t>(1, d_model / default_head_width));
}

int64_t value_width_of(const RetentionConfig& config, int64_t d_model) {
  return config.d_value.value_or(2 * d_model);
}

}  // namespace

void RetentionConfig::declare(Options& options) {
  options.optional_integer("n_heads", &n_heads, "heads; null: d_model / 256, at least 1").at_least(1);
  options
      .optional_integer("d_value", &d_value, "channels of the values, all heads together; null: 2 * d_model")
      .at_least(1);
  options.text("gate_fn", &gate_fn, "of the gate: swish is x sigmoid(x)").one_of({"swish", "gelu"});
  options.real("norm_epsilon", &norm_epsilon, "of the norm of each head").above(0).alias("norm_eps");
  options.integer("chunk_len", &chunk_len, "steps per chunk; a matter of speed, results do not depend on it")
      .at_least(1)
      .alias("chunk_size");
  options.text("form", &form, "how the recurrence is computed; results do not depend on it")
      .one_of({"automatic", "chunked", "recurrent"});
}

void RetentionConfig::validate(int64_t d_model, const std::string& path) const {
  const int64_t heads = heads_of(*this, d_model), values = value_width_of(*this, d_model);
  require(d_model % heads == 0, "{}.n_heads is {}; it must divide d_model = {}", path, heads, d_model);
  require(d_model / heads % 2 == 0,
          "{}.n_heads is {}; d_model / n_heads = {} must be even, as pairs of channels are rotated", path,
          heads, d_model / heads);
  require(values % heads == 0, "{}.d_value is {}; it must be a multiple of n_heads = {}", path, values,
          heads);
}

std::unique_ptr<Mixer> RetentionConfig::make(int64_t d_model, int64_t /*n_layers*/) const {
  return std::make_unique<RetentionMixer>(*this, d_model);
}

RetentionMixer::RetentionMixer(const RetentionConfig& config, int64_t d_model)
    : config_(config),
      d_model_(d_model),
      n_heads_(heads_of(config, d_model)),
      d_value_(value_width_of(config, d_model)),
      d_key_(d_model / n_heads_) {}

void RetentionMixer::declare_parameters(const ParameterScope& scope) {
  // Xavier's uniform distribution with the authors' gains.
  const auto add = [&](const std::string& name, Variable* weight, int64_t rows, int64_t columns,
                       double gain) {
    const double bound = gain * std::sqrt(6.0 / static_cast<double>(rows + columns));
    scope.add(name + ".weight", weight, {rows, columns}, uniform_initializer(bound), matrix);
  };
  const double gain = std::exp2(-2.5);
  add("q_proj", &q_proj_weight_, d_model_, d_model_, gain);
  add("k_proj", &k_proj_weight_, d_model_, d_model_, gain);
  add("v_proj", &v_proj_weight_, d_value_, d_model_, gain);
  add("g_proj", &g_proj_weight_, d_value_, d_model_, gain);
  add("out_proj", &out_proj_weight_, d_model_, d_value_, 0.5);
}

/// r / sqrt(n), and the state.
MatrixStateOutput RetentionMixer::retain(const Variable& x, const RetentionSchedule& schedule,
                                         const MixerState& state, const Tensor& resets) const {
  const int64_t batch = x.dim(0), length = x.dim(1);
  const Shape key_shape{batch, length, n_heads_, d_key_};
  const Variable q = reshape(linear(x, q_proj_weight_), key_shape);
  const Variable k = reshape(linear(x, k_proj_weight_), key_shape);
  const Variable v = reshape(linear(x, v_proj_weight_), {batch, length, n_heads_, d_value_ / n_heads_});
  const double key_factor = 1.0 / std::sqrt(static_cast<double>(d_key_));
  return chunked_matrix_state({.q = rotate_pairs(q, schedule.rotation, {.row_scale = schedule.row_scale}),
                               .k = rotate_pairs(k, schedule.rotation, {.factor = key_factor}),
                               .v = v,
                               .log_decay = Variable(schedule.log_decay),
                               .value_scale = {},
                               .skip = {},
                               .initial_state = state.empty() ? Variable() : state[0],
                               .resets = resets},
                              {.chunk_len = config_.chunk_len, .form = parse_form(config_.form)});
}

Variable RetentionMixer::gated_norm(const Variable& retained, const Variable& gate) const {
  const Variable no_weight(Tensor::full({d_value_}, 1.0, compute_dtype(retained.dtype()), retained.device()));
  const RmsNormOptions per_head{
      .epsilon = config_.norm_epsilon, .n_groups = n_heads_, .norm_before_gate = true};
  if (config_.gate_fn == "swish") return rms_norm(retained, no_weight, gate, per_head);
  return mul(gelu(gate), rms_norm(retained, no_weight, {}, per_head));
}

MixerOutput RetentionMixer::forward(const Variable& x, const MixerState& state, const Tensor& resets) const {
  const int64_t batch = x.dim(0), length = x.dim(1);
  const RetentionSchedule schedule = retention_schedule(state.empty() ? Tensor() : state[1].value(), resets,
                                                        {.batch = batch,
                                                         .length = length,
                                                         .n_heads = n_heads_,
                                                         .d_key = d_key_,
                                                         .dtype = compute_dtype(x.dtype()),
                                                         .device = x.device()});
  const MatrixStateOutput retained = retain(x, schedule, state, resets);
  const auto gate = [this, r = reshape(retained.y, {batch, length, d_value_}),
                     g = linear(x, g_proj_weight_)] { return gated_norm(r, g); };
  // Computed again in the backward: a pass over r and g instead of a kept tensor of their size.
  const Variable gated = gate();
  Variable y = linear(gated, out_proj_weight_);
  recompute_values({&y}, {gated}, [gate] { return std::vector{gate()}; });
  return {y, {retained.final_state, Variable(schedule.next_position)}};
}

int64_t RetentionMixer::state_size() const {
  return d_key_ * d_value_ + 1;
}

double RetentionMixer::flops_per_token() const {
  const int64_t Q = config_.chunk_len, N = d_key_, P = d_value_ / n_heads_;
  return static_cast<double>(n_heads_ * (2 * Q * N + Q * P + 4 * N * P));
}

}  // namespace headwater
