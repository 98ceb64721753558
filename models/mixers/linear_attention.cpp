#include "models/mixers/linear_attention.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/divide_by_last/divide_by_last.h"
#include "ops/elementwise/elementwise.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"

namespace headwater {
namespace {

constexpr int64_t default_head_width = 64;

MatrixStateForm parse_form(const std::string& form) {
  if (form == "chunked") return MatrixStateForm::chunked;
  if (form == "recurrent") return MatrixStateForm::recurrent;
  return MatrixStateForm::automatic;
}

int64_t heads_of(const LinearAttentionConfig& config, int64_t d_model) {
  return config.n_heads.value_or(std::max<int64_t>(1, d_model / default_head_width));
}

}  // namespace

void LinearAttentionConfig::declare(Options& options) {
  options.optional_integer("n_heads", &n_heads, "heads; null: d_model / 64, at least 1").at_least(1);
  options.optional_integer("d_keys", &d_keys, "width of a head's queries and keys; null: d_model / n_heads")
      .at_least(1);
  options.optional_integer("d_values", &d_values, "width of a head's values; null: d_model / n_heads")
      .at_least(1);
  options
      .text("feature_map", &feature_map,
            "of queries and keys: elu is elu(x) + 1, positive everywhere; relu is max(x, 0); identity is "
            "for normalize: false")
      .one_of({"elu", "relu", "identity"});
  options.boolean("causal", &causal, "false: every token sees the whole sequence, for encoders");
  options.boolean("normalize", &normalize, "divide by the sum of the weights; false: the plain sum");
  options.real("epsilon", &epsilon, "added to the sum of the weights").at_least(0).alias("eps");
  options.boolean("bias", &bias, "biases of the four projections");
  options.integer("chunk_len", &chunk_len, "steps per chunk; a matter of speed, results do not depend on it")
      .at_least(1)
      .alias("chunk_size");
  options.text("form", &form, "how the recurrence is computed; results do not depend on it")
      .one_of({"automatic", "chunked", "recurrent"});
}

void LinearAttentionConfig::validate(int64_t d_model, const std::string& path) const {
  const int64_t heads = heads_of(*this, d_model);
  require((d_keys && d_values) || d_model % heads == 0,
          "{}.n_heads is {}; it must divide d_model = {}, or d_keys and d_values must both be given", path,
          heads, d_model);
  require(!normalize || feature_map != "identity",
          "{}.feature_map is identity; its weights have any sign and may add up to 0, so normalize must be "
          "false",
          path);
}

std::unique_ptr<Mixer> LinearAttentionConfig::make(int64_t d_model, int64_t /*n_layers*/) const {
  return std::make_unique<LinearAttentionMixer>(*this, d_model);
}

LinearAttentionMixer::LinearAttentionMixer(const LinearAttentionConfig& config, int64_t d_model)
    : config_(config),
      d_model_(d_model),
      n_heads_(heads_of(config, d_model)),
      d_keys_(config.d_keys.value_or(d_model / n_heads_)),
      d_values_(config.d_values.value_or(d_model / n_heads_)) {}

void LinearAttentionMixer::declare_parameters(const ParameterScope& scope) {
  // The default of the authors' linear layers: weights and biases uniform, within 1 / sqrt(inputs).
  const auto add = [&](const std::string& name, Variable* weight, Variable* bias, int64_t rows,
                       int64_t columns) {
    const Initializer initializer = uniform_initializer(1.0 / std::sqrt(static_cast<double>(columns)));
    scope.add(name + ".weight", weight, {rows, columns}, initializer, matrix);
    if (config_.bias) scope.add(name + ".bias", bias, {rows}, initializer, no_weight_decay);
  };
  add("query_projection", &query_weight_, &query_bias_, n_heads_ * d_keys_, d_model_);
  add("key_projection", &key_weight_, &key_bias_, n_heads_ * d_keys_, d_model_);
  add("value_projection", &value_weight_, &value_bias_, n_heads_ * d_values_, d_model_);
  add("out_projection", &out_weight_, &out_bias_, d_model_, n_heads_ * d_values_);
}

Variable LinearAttentionMixer::features(const Variable& x) const {
  if (config_.feature_map == "relu") return relu(x);
  if (config_.feature_map == "identity") return x;
  return elu_plus_one(x);
}

/// The weighted sums of the values, of every step so far or of all. In the latter case the engine runs twice: once for
/// the final state alone, and once to read it at every step, with keys of zero that leave it as it is.
MatrixStateOutput LinearAttentionMixer::attend(const Variable& q, const Variable& k, const Variable& v,
                                               const MixerState& state, const Tensor& resets) const {
  const MatrixStateOptions engine{.chunk_len = config_.chunk_len, .form = parse_form(config_.form)};
  const auto run = [&](const Variable& queries, const Variable& keys, const Variable& values,
                       const Variable& initial_state) {
    return chunked_matrix_state({.q = queries,
                                 .k = keys,
                                 .v = values,
                                 .log_decay = {},
                                 .value_scale = {},
                                 .skip = {},
                                 .initial_state = initial_state,
                                 .resets = resets},
                                engine);
  };
  if (config_.causal) return run(q, k, v, state.empty() ? Variable() : state[0]);
  const Variable total = run(q.detach(), k, v, {}).final_state;
  return run(q, Variable(zeros_like(k.value())), Variable(zeros_like(v.value())), total);
}

MixerOutput LinearAttentionMixer::forward(const Variable& x, const MixerState& state,
                                          const Tensor& resets) const {
  const int64_t batch = x.dim(0), length = x.dim(1);
  require(config_.causal || state.empty(),
          "linear_attention: a state was handed over, but with causal: false every token sees the whole "
          "sequence, which must be given at once");
  require(config_.causal || !resets.defined(),
          "linear_attention: documents in a packed row need causal: true; with causal: false give every "
          "document a row of its own");
  const Shape key_shape{batch, length, n_heads_, d_keys_};
  const Variable q = features(reshape(linear(x, query_weight_, query_bias_), key_shape));
  const Variable k = features(reshape(linear(x, key_weight_, key_bias_), key_shape));
  Variable v = reshape(linear(x, value_weight_, value_bias_), {batch, length, n_heads_, d_values_});
  if (config_.normalize) {
    const Tensor ones = Tensor::full({batch, length, n_heads_, 1}, 1.0, v.dtype(), v.device());
    v = concat_last(v, Variable(ones));
  }
  const MatrixStateOutput sums = attend(q, k, v, state, resets);
  const Variable mixed = config_.normalize ? divide_by_last(sums.y, config_.epsilon) : sums.y;
  const Variable y = linear(reshape(mixed, {batch, length, n_heads_ * d_values_}), out_weight_, out_bias_);
  return {y, config_.causal ? MixerState{sums.final_state} : MixerState{}};
}

int64_t LinearAttentionMixer::state_size() const {
  return config_.causal ? n_heads_ * d_keys_ * (d_values_ + (config_.normalize ? 1 : 0)) : 0;
}

double LinearAttentionMixer::flops_per_token() const {
  const int64_t Q = config_.chunk_len, N = d_keys_, P = d_values_ + (config_.normalize ? 1 : 0);
  return static_cast<double>(n_heads_ * (2 * Q * N + Q * P + 4 * N * P)) * (config_.causal ? 1.0 : 2.0);
}

}  // namespace headwater
