#include "models/mixers/mamba2.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "autograd/tape.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/elementwise/elementwise.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/ssd/ssd.h"

namespace headwater {
namespace {

constexpr double norm_epsilon = 1e-5;

MatrixStateForm parse_form(const std::string& form) {
  if (form == "chunked") return MatrixStateForm::chunked;
  if (form == "recurrent") return MatrixStateForm::recurrent;
  return MatrixStateForm::automatic;
}

}  // namespace

void Mamba2Config::declare(Options& options) {
  options.integer("d_state", &d_state, "numbers of state per channel (N)").at_least(1);
  options.integer("head_dim", &head_dim, "channels of a head (P)").at_least(1).alias("headdim");
  options.integer("d_conv", &d_conv, "taps of the causal convolution").at_least(1);
  options
      .optional_real("conv_init", &conv_init,
                     "start the convolution's weights uniform on [-conv_init, conv_init]")
      .above(0);
  options.integer("expand", &expand, "d_inner = expand * d_model").at_least(1);
  options
      .optional_integer("d_ssm", &d_ssm,
                        "channels of the recurrence; null: d_inner. The rest form a gated MLP")
      .at_least(1);
  options.integer("n_groups", &n_groups, "groups of heads that share B and C").at_least(1).alias("ngroups");
  options.real_pair("A_init_range", &A_init_range, "initial -A is uniform on it").above(0);
  options.boolean("D_has_hdim", &D_has_hdim, "a skip weight per channel instead of per head");
  options.boolean("rmsnorm", &rmsnorm, "gated RMSNorm before the output projection; false: the gate alone");
  options.boolean("norm_before_gate", &norm_before_gate, "norm(y) * silu(z) instead of norm(y * silu(z))");
  options
      .optional_integer("norm_groups", &norm_groups,
                        "groups of channels that are normalised apart; null: n_groups, as the authors' code. "
                        "The transformers package uses 1")
      .at_least(1);
  options.real("dt_min", &dt_min, "lower end of the initial step sizes").above(0);
  options.real("dt_max", &dt_max, "upper end of the initial step sizes").above(0);
  options.real("dt_init_floor", &dt_init_floor, "initial step sizes are at least this").above(0);
  options.limits("dt_limit", &dt_limit, "clamp of the step size after softplus; null: no limit on that side");
  options.boolean("bias", &bias, "biases of the input and output projections");
  options.boolean("conv_bias", &conv_bias, "bias of the convolution");
  options.integer("chunk_len", &chunk_len, "steps per chunk; a matter of speed, results do not depend on it")
      .at_least(1)
      .alias("chunk_size");
  options.boolean("learnable_init_states", &learnable_init_states,
                  "a trained start state, shared by the batch");
  options.text("form", &form, "how the recurrence is computed; results do not depend on it")
      .one_of({"automatic", "chunked", "recurrent"});
}

void Mamba2Config::validate(int64_t d_model, const std::string& path) const {
  const int64_t d_inner = expand * d_model;
  const int64_t ssm = d_ssm.value_or(d_inner);
  require(ssm <= d_inner, "{}.d_ssm is {}; it must not exceed expand * d_model = {}", path, ssm, d_inner);
  require(ssm % head_dim == 0, "{}.head_dim is {}; it must divide {} = {}", path, head_dim,
          d_ssm ? "d_ssm" : "expand * d_model", ssm);
  const int64_t n_heads = ssm / head_dim;
  require(n_heads % n_groups == 0,
          "{}.n_groups is {}; it must divide the number of heads, {} / head_dim = {}", path, n_groups, ssm,
          n_heads);
  const int64_t groups = norm_groups.value_or(n_groups);
  require(ssm % groups == 0, "{}.norm_groups is {}; it must divide the {} channels of the recurrence", path,
          groups, ssm);
  require(A_init_range[0] <= A_init_range[1],
          "{}.A_init_range is [{}, {}]; the first must not exceed the second", path, A_init_range[0],
          A_init_range[1]);
  require(dt_min <= dt_max, "{}.dt_min is {}; it must not exceed dt_max = {}", path, dt_min, dt_max);
  require(!dt_limit[0] || !dt_limit[1] || *dt_limit[0] <= *dt_limit[1],
          "{}.dt_limit is [{}, {}]; the first must not exceed the second", path, dt_limit[0].value_or(0),
          dt_limit[1].value_or(0));
}

std::unique_ptr<Mixer> Mamba2Config::make(int64_t d_model, int64_t n_layers) const {
  return std::make_unique<Mamba2Mixer>(*this, d_model, n_layers);
}

Mamba2Mixer::Mamba2Mixer(const Mamba2Config& config, int64_t d_model, int64_t n_layers)
    : config_(config),
      d_model_(d_model),
      n_layers_(n_layers),
      d_inner_(config.expand * d_model),
      d_ssm_(config.d_ssm.value_or(d_inner_)),
      d_mlp_(d_inner_ - d_ssm_),
      n_heads_(d_ssm_ / config.head_dim),
      d_bc_(config.n_groups * config.d_state) {}

void Mamba2Mixer::declare_parameters(const ParameterScope& scope) {
  const int64_t rows = 2 * d_mlp_ + 2 * d_ssm_ + 2 * d_bc_ + n_heads_;
  const int64_t conv_channels = d_ssm_ + 2 * d_bc_;
  const double conv_bound = 1.0 / std::sqrt(static_cast<double>(config_.d_conv));
  scope.add("in_proj.weight", &in_proj_weight_, {rows, d_model_},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(d_model_))), matrix);
  if (config_.bias)
    scope.add("in_proj.bias", &in_proj_bias_, {rows}, constant_initializer(0.0), no_weight_decay);
  scope.add("conv1d.weight", &conv1d_weight_, {conv_channels, 1, config_.d_conv},
            uniform_initializer(config_.conv_init.value_or(conv_bound)));
  if (config_.conv_bias) {
    scope.add("conv1d.bias", &conv1d_bias_, {conv_channels}, uniform_initializer(conv_bound),
              no_weight_decay);
  }
  // The inverse softplus of a step size drawn log-uniformly: softplus(dt_bias) starts in [dt_min, dt_max].
  const auto draw_dt_bias = [config = config_](RandomStream& random) {
    const double dt = std::exp(random.uniform(std::log(config.dt_min), std::log(config.dt_max)));
    const double floored = std::max(dt, config.dt_init_floor);
    return floored + std::log(-std::expm1(-floored));
  };
  scope.add("dt_bias", &dt_bias_, {n_heads_}, drawn_initializer(draw_dt_bias), no_weight_decay);
  const auto draw_A_log = [range = config_.A_init_range](RandomStream& random) {
    return std::log(random.uniform(range[0], range[1]));
  };
  scope.add("A_log", &A_log_, {n_heads_}, drawn_initializer(draw_A_log), no_weight_decay);
  if (config_.learnable_init_states) {
    scope.add("init_states", &init_states_, {n_heads_, config_.head_dim, config_.d_state},
              constant_initializer(0.0), no_weight_decay);
  }
  scope.add("D", &D_, {config_.D_has_hdim ? d_ssm_ : n_heads_}, constant_initializer(1.0), no_weight_decay);
  if (config_.rmsnorm)
    scope.add("norm.weight", &norm_weight_, {d_ssm_}, constant_initializer(1.0), no_weight_decay);
  // Divided by sqrt(n_layers) so that the sum over the residual stream starts with the same variance at any depth.
  scope.add("out_proj.weight", &out_proj_weight_, {d_model_, d_inner_},
            uniform_initializer(1.0 / std::sqrt(static_cast<double>(d_inner_ * n_layers_))), matrix);
  if (config_.bias)
    scope.add("out_proj.bias", &out_proj_bias_, {d_model_}, constant_initializer(0.0), no_weight_decay);
}

Mamba2Mixer::Projections Mamba2Mixer::project(const Variable& x) const {
  int64_t row = 0;
  const auto next = [&](int64_t n_rows) {
    if (n_rows == 0) return Variable();
    const int64_t begin = row;
    row += n_rows;
    const Variable bias = in_proj_bias_.defined() ? in_proj_bias_.parameter_rows(begin, row) : Variable();
    return linear(x, in_proj_weight_.parameter_rows(begin, row), bias);
  };
  // Braces: the members are evaluated in the order in which the rows lie.
  return Projections{next(d_mlp_), next(d_mlp_), next(d_ssm_),  next(d_ssm_),
                     next(d_bc_),  next(d_bc_),  next(n_heads_)};
}

Variable Mamba2Mixer::initial_ssm_state(const MixerState& state, int64_t batch) const {
  if (!state.empty()) return state[3];
  if (!init_states_.defined()) return {};
  return repeat_leading(transpose_last(init_states_), batch);
}

MixerOutput Mamba2Mixer::forward(const Variable& x, const MixerState& state, const Tensor& resets) const {
  const int64_t batch = x.dim(0), length = x.dim(1);
  const Projections in = project(x);

  const Variable taps = conv1d_weight_.parameter_reshape({d_ssm_ + 2 * d_bc_, config_.d_conv});
  const auto convolve = [=, this](const Variable& input, int64_t first_channel, size_t index) {
    const int64_t end = first_channel + input.dim(2);
    return causal_conv1d(input, taps.parameter_rows(first_channel, end),
                         config_.conv_bias ? conv1d_bias_.parameter_rows(first_channel, end) : Variable(),
                         state.empty() ? Variable() : state[index], resets, {.state_length = config_.d_conv});
  };
  // What the convolutions give the engine is computed again in the backward: a pass over x instead of a
  // kept tensor of its size. So is what the gate gives the output projection.
  const auto convolve_all = [this, convolve, x = in.x, B = in.B, C = in.C] {
    return std::array{convolve(x, 0, 0), convolve(B, d_ssm_, 1), convolve(C, d_ssm_ + d_bc_, 2)};
  };
  const auto [values, B, C] = convolve_all();

  const Shape group_shape{batch, length, config_.n_groups, config_.d_state};
  MatrixStateOutput mixed =
      ssd({.x = reshape(values.y, {batch, length, n_heads_, config_.head_dim}),
           .dt = in.dt,
           .A = negative_exp(A_log_),
           .B = reshape(B.y, group_shape),
           .C = reshape(C.y, group_shape),
           .D = config_.D_has_hdim ? D_.parameter_reshape({n_heads_, config_.head_dim}) : D_,
           .dt_bias = dt_bias_,
           .initial_state = initial_ssm_state(state, batch),
           .resets = resets},
          {.limits = config_.dt_limit}, {.chunk_len = config_.chunk_len, .form = parse_form(config_.form)});

  recompute_values({&mixed.y, &mixed.final_state}, {values.y, B.y, C.y}, [convolve_all] {
    const auto again = convolve_all();
    return std::vector{again[0].y, again[1].y, again[2].y};
  });

  const auto gate = [=, this, y = reshape(mixed.y, {batch, length, d_ssm_})] {
    const Variable gated = config_.rmsnorm
                               ? rms_norm(y, norm_weight_, in.z,
                                          {.epsilon = norm_epsilon,
                                           .n_groups = config_.norm_groups.value_or(config_.n_groups),
                                           .norm_before_gate = config_.norm_before_gate})
                               : silu_mul(in.z, y);
    return d_mlp_ > 0 ? concat_last(silu_mul(in.z0, in.x0), gated) : gated;
  };
  const Variable gated = gate();
  Variable y = linear(gated, out_proj_weight_, out_proj_bias_);
  recompute_values({&y}, {gated}, [gate] { return std::vector{gate()}; });
  return {y, {values.final_state, B.final_state, C.final_state, mixed.final_state}};
}

int64_t Mamba2Mixer::state_size() const {
  return (d_ssm_ + 2 * d_bc_) * config_.d_conv + d_ssm_ * config_.d_state;
}

double Mamba2Mixer::flops_per_token() const {
  const int64_t Q = config_.chunk_len, N = config_.d_state, P = config_.head_dim;
  return static_cast<double>(config_.n_groups * 2 * Q * N + n_heads_ * (Q * P + 4 * N * P));
}

std::map<std::string, Variable> Mamba2Mixer::published_state(const MixerState& state) const {
  const Variable window = concat_last(concat_last(state[0], state[1]), state[2]);
  return {{"final_conv_state", transpose_last(window)}, {"final_ssm_state", transpose_last(state[3])}};
}

}  // namespace headwater
