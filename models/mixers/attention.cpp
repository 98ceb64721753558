#include "models/mixers/attention.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/attention/attention.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/document_positions/document_positions.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"
#include "ops/rotary/rotary.h"

namespace headwater {
namespace {

/// Where a state holds what.
enum StatePart { cached_keys, cached_values, n_seen, first_window };

/// The steps of `past` and then those of `next`, both (batch, steps, n_heads, head_dim). Copies the past, which takes no
/// longer than attention's reading it.
Variable append_steps(const Variable& past, const Variable& next) {
  const int64_t batch = next.dim(0), width = next.dim(2) * next.dim(3);
  const Variable joined =
      concat_last(reshape(past, {batch, past.dim(1) * width}), reshape(next, {batch, next.dim(1) * width}));
  return reshape(joined, {batch, past.dim(1) + next.dim(1), next.dim(2), next.dim(3)});
}

/// The last `count` steps, or all there are.
Variable last_steps(const Variable& x, int64_t count) {
  const int64_t batch = x.dim(0), length = x.dim(1), width = x.dim(2) * x.dim(3);
  if (length <= count) return x;
  const Variable rows = reshape(x, {batch, length * width});
  return reshape(narrow_last(rows, (length - count) * width, length * width),
                 {batch, count, x.dim(2), x.dim(3)});
}

}  // namespace

void AttentionConfig::declare(Options& options) {
  options.integer("n_heads", &n_heads, "heads of queries (H); must be given").at_least(1).alias("num_heads");
  options
      .optional_integer(
          "n_kv_heads", &n_kv_heads,
          "heads of keys and values, each read by n_heads / n_kv_heads neighbouring query heads; null: "
          "n_heads")
      .at_least(1)
      .alias("num_heads_kv");
  options.optional_integer("head_dim", &head_dim, "channels of a head (D); null: d_model / n_heads")
      .at_least(1);
  options.boolean("qkv_proj_bias", &qkv_proj_bias, "bias of the projection to queries, keys and values");
  options.boolean("out_proj_bias", &out_proj_bias, "bias of the output projection");
  options.optional_real("softmax_scale", &softmax_scale, "factor of the scores; null: 1 / sqrt(head_dim)")
      .above(0);
  options.boolean("causal", &causal, "a step sees none after it; only true is built");
  options
      .integer("d_conv", &d_conv,
               "taps of a causal convolution over queries, keys and values, without activation; 0: none")
      .at_least(0);
  options
      .integer("rotary_dim", &rotary_dim,
               "channels of a head that are rotated by its position, even; 0: none")
      .at_least(0)
      .alias("rotary_emb_dim");
  options.real("rotary_base", &rotary_base, "base of the rotation's frequencies")
      .above(0)
      .alias("rotary_emb_base");
  options
      .boolean("rotary_interleaved", &rotary_interleaved,
               "pairs of neighbouring channels (GPT-J) instead of channels rotary_dim / 2 apart (GPT-NeoX)")
      .alias("rotary_emb_interleaved");
  options.integer("window_size", &window_size, "steps before its own that a step sees; -1: all").at_least(-1);
}

void AttentionConfig::validate(int64_t d_model, const std::string& path) const {
  require(n_heads >= 1, "{}.n_heads is missing; write the number of heads, such as n_heads: 4", path);
  require(head_dim || d_model % n_heads == 0,
          "{}.n_heads is {}; it must divide d_model = {}, or head_dim must be given", path, n_heads, d_model);
  require(n_heads % n_kv_heads.value_or(n_heads) == 0, "{}.n_kv_heads is {}; it must divide n_heads = {}",
          path, n_kv_heads.value_or(n_heads), n_heads);
  require(causal,
          "{}.causal is false; only causal attention is built, whose state can be handed along a sequence",
          path);
  require(d_conv != 1, "{}.d_conv is 1; it must be 0 (no convolution) or at least 2", path);
  const int64_t channels = head_dim.value_or(d_model / n_heads);
  require(rotary_dim % 2 == 0 && rotary_dim <= channels,
          "{}.rotary_dim is {}; it must be even and not exceed head_dim = {}", path, rotary_dim, channels);
}

std::unique_ptr<Mixer> AttentionConfig::make(int64_t d_model, int64_t n_layers) const {
  return std::make_unique<AttentionMixer>(*this, d_model, n_layers);
}

AttentionMixer::AttentionMixer(const AttentionConfig& config, int64_t d_model, int64_t n_layers)
    : config_(config),
      d_model_(d_model),
      n_layers_(n_layers),
      n_kv_heads_(config.n_kv_heads.value_or(config.n_heads)),
      head_dim_(config.head_dim.value_or(d_model / config.n_heads)),
      d_q_(config.n_heads * head_dim_),
      d_kv_(n_kv_heads_ * head_dim_) {}

void AttentionMixer::declare_parameters(const ParameterScope& scope) {
  const int64_t rows = d_q_ + 2 * d_kv_;
  scope.add("in_proj.weight", &in_proj_weight_, {rows, d_model_},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(d_model_))), matrix);
  if (config_.qkv_proj_bias)
    scope.add("in_proj.bias", &in_proj_bias_, {rows}, constant_initializer(0.0), no_weight_decay);
  if (config_.d_conv > 0) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(config_.d_conv));
    scope.add("conv1d.weight", &conv1d_weight_, {rows, 1, config_.d_conv}, uniform_initializer(bound));
    scope.add("conv1d.bias", &conv1d_bias_, {rows}, uniform_initializer(bound), no_weight_decay);
  }
  // Divided by sqrt(n_layers) so that the sum over the residual stream starts with the same variance at any depth.
  scope.add("out_proj.weight", &out_proj_weight_, {d_model_, d_q_},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(d_q_ * n_layers_))), matrix);
  if (config_.out_proj_bias)
    scope.add("out_proj.bias", &out_proj_bias_, {d_model_}, constant_initializer(0.0), no_weight_decay);
}

AttentionMixer::Heads AttentionMixer::project(const Variable& x) const {
  const auto rows = [&](int64_t begin, int64_t end) {
    const Variable bias = in_proj_bias_.defined() ? in_proj_bias_.parameter_rows(begin, end) : Variable();
    return linear(x, in_proj_weight_.parameter_rows(begin, end), bias);
  };
  return {rows(0, d_q_), rows(d_q_, d_q_ + d_kv_), rows(d_q_ + d_kv_, d_q_ + 2 * d_kv_)};
}

AttentionMixer::Heads AttentionMixer::convolve(const Heads& in, const MixerState& state, const Tensor& resets,
                                               MixerState& state_out) const {
  if (config_.d_conv == 0) return in;
  const Variable taps = conv1d_weight_.parameter_reshape({d_q_ + 2 * d_kv_, config_.d_conv});
  const auto channels = [&](const Variable& input, int64_t begin, size_t index) {
    const int64_t end = begin + input.dim(2);
    const CausalConv1dOutput output =
        causal_conv1d(input, taps.parameter_rows(begin, end), conv1d_bias_.parameter_rows(begin, end),
                      state.empty() ? Variable() : state[first_window + index], resets, {.silu = false});
    state_out.push_back(output.final_state);
    return output.y;
  };
  return {channels(in.q, 0, 0), channels(in.k, d_q_, 1), channels(in.v, d_q_ + d_kv_, 2)};
}

Variable AttentionMixer::rotate(const Variable& heads, const Tensor& positions) const {
  if (config_.rotary_dim == 0) return heads;
  return rotary(
      heads, positions,
      {.dim = config_.rotary_dim, .base = config_.rotary_base, .interleaved = config_.rotary_interleaved});
}

MixerOutput AttentionMixer::forward(const Variable& x, const MixerState& state, const Tensor& resets) const {
  const int64_t batch = x.dim(0), length = x.dim(1);
  MixerState windows;
  const Heads in = convolve(project(x), state, resets, windows);
  const DocumentPositions document =
      document_positions(resets, state.empty() ? Tensor() : state[n_seen].value(), batch, length, x.device());
  const Variable q = rotate(reshape(in.q, {batch, length, config_.n_heads, head_dim_}), document.positions);
  Variable k = rotate(reshape(in.k, {batch, length, n_kv_heads_, head_dim_}), document.positions);
  Variable v = reshape(in.v, {batch, length, n_kv_heads_, head_dim_});
  if (!state.empty()) {
    k = append_steps(state[cached_keys], k);
    v = append_steps(state[cached_values], v);
  }
  const Variable mixed =
      attention(q, k, v, document.positions, {.scale = config_.softmax_scale, .window = config_.window_size});
  const Variable y = linear(reshape(mixed, {batch, length, d_q_}), out_proj_weight_, out_proj_bias_);

  const int64_t kept = config_.window_size < 0 ? k.dim(1) : std::max<int64_t>(1, config_.window_size);
  MixerState state_out{last_steps(k, kept), last_steps(v, kept), Variable(document.n_seen)};
  state_out.insert(state_out.end(), windows.begin(), windows.end());
  return {y, std::move(state_out)};
}

int64_t AttentionMixer::state_size() const {
  const int64_t tokens = std::max<int64_t>(1, config_.window_size);
  const int64_t window = config_.d_conv > 0 ? (d_q_ + 2 * d_kv_) * (config_.d_conv - 1) : 0;
  return tokens * 2 * d_kv_ + 1 + window;
}

double AttentionMixer::flops_per_token() const {
  return 4.0 * static_cast<double>(d_q_) * static_cast<double>(std::max<int64_t>(0, config_.window_size) + 1);
}

}  // namespace headwater
