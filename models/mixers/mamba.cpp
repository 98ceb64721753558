#include "models/mixers/mamba.h"

#include <algorithm>
#include <cmath>

#include "autograd/tape.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/elementwise/elementwise.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"
#include "ops/selective_scan/selective_scan.h"

namespace headwater {
namespace {

/// log(n) for n = 1 ... d_state in every row (S4D-real): rates -1, -2, ... -d_state.
Initializer log_of_state_number() {
  return [](const Tensor& value, RandomStream&) {
    const int64_t d_state = value.dim(1);
    dispatch_real(value.dtype(), "initialize", [&](auto element) {
      using T = decltype(element);
      for (int64_t i = 0; i < value.numel(); ++i)
        value.data<T>()[i] = static_cast<T>(std::log(static_cast<double>(i % d_state + 1)));
    });
  };
}

double inverse_sqrt(int64_t size) {
  return 1.0 / std::sqrt(static_cast<double>(size));
}

}  // namespace

void MambaConfig::declare(Options& options) {
  options.integer("d_state", &d_state, "numbers of state per channel (N)").at_least(1);
  options.integer("d_conv", &d_conv, "taps of the causal convolution").at_least(1);
  options.integer("expand", &expand, "d_inner = expand * d_model").at_least(1);
  options
      .optional_integer("dt_rank", &dt_rank,
                        "width between the two projections of dt; null: d_model / 16, rounded up")
      .at_least(1);
  options.real("dt_min", &dt_min, "lower end of the initial step sizes").above(0);
  options.real("dt_max", &dt_max, "upper end of the initial step sizes").above(0);
  options.text("dt_init", &dt_init, "initial weights of dt_proj: uniform, or all the same")
      .one_of({"random", "constant"});
  options.real("dt_scale", &dt_scale, "initial weights of dt_proj are of size dt_scale / sqrt(dt_rank)")
      .above(0);
  options.real("dt_init_floor", &dt_init_floor, "initial step sizes are at least this").above(0);
  options.boolean("conv_bias", &conv_bias, "bias of the convolution");
  options.boolean("bias", &bias, "biases of the input and output projections");
}

void MambaConfig::validate(int64_t d_model, const std::string& path) const {
  require(dt_min <= dt_max, "{}.dt_min is {}; it must not exceed dt_max = {}", path, dt_min, dt_max);
  const int64_t d_inner = expand * d_model;
  require(!dt_rank || *dt_rank <= d_inner,
          "{}.dt_rank is {}; it must not exceed expand * d_model = {}, the step sizes that it gives", path,
          dt_rank.value_or(0), d_inner);
}

std::unique_ptr<Mixer> MambaConfig::make(int64_t d_model, int64_t n_layers) const {
  return std::make_unique<MambaMixer>(*this, d_model, n_layers);
}

MambaMixer::MambaMixer(const MambaConfig& config, int64_t d_model, int64_t n_layers)
    : config_(config),
      d_model_(d_model),
      n_layers_(n_layers),
      d_inner_(config.expand * d_model),
      dt_rank_(config.dt_rank.value_or((d_model + 15) / 16)) {}

void MambaMixer::declare_parameters(const ParameterScope& scope) {
  const double conv_bound = inverse_sqrt(config_.d_conv);
  scope.add("in_proj.weight", &in_proj_weight_, {2 * d_inner_, d_model_},
            uniform_initializer(inverse_sqrt(d_model_)), matrix);
  if (config_.bias)
    scope.add("in_proj.bias", &in_proj_bias_, {2 * d_inner_}, constant_initializer(0.0), no_weight_decay);
  scope.add("conv1d.weight", &conv1d_weight_, {d_inner_, 1, config_.d_conv}, uniform_initializer(conv_bound));
  if (config_.conv_bias)
    scope.add("conv1d.bias", &conv1d_bias_, {d_inner_}, uniform_initializer(conv_bound), no_weight_decay);
  scope.add("x_proj.weight", &x_proj_weight_, {dt_rank_ + 2 * config_.d_state, d_inner_},
            uniform_initializer(inverse_sqrt(d_inner_)), matrix);
  // Keeps the variance of dt through the projection.
  const double dt_bound = config_.dt_scale * inverse_sqrt(dt_rank_);
  scope.add("dt_proj.weight", &dt_proj_weight_, {d_inner_, dt_rank_},
            config_.dt_init == "constant" ? constant_initializer(dt_bound) : uniform_initializer(dt_bound),
            matrix);
  // The inverse softplus of a step size drawn log-uniformly: softplus(bias) starts in [dt_min, dt_max].
  const auto draw_dt_bias = [config = config_](RandomStream& random) {
    const double dt = std::exp(random.uniform(std::log(config.dt_min), std::log(config.dt_max)));
    const double floored = std::max(dt, config.dt_init_floor);
    return floored + std::log(-std::expm1(-floored));
  };
  scope.add("dt_proj.bias", &dt_proj_bias_, {d_inner_}, drawn_initializer(draw_dt_bias), no_weight_decay);
  scope.add("A_log", &A_log_, {d_inner_, config_.d_state}, log_of_state_number(), no_weight_decay);
  scope.add("D", &D_, {d_inner_}, constant_initializer(1.0), no_weight_decay);
  // Divided by sqrt(n_layers) so that the sum over the residual stream starts with the same variance at any depth.
  scope.add("out_proj.weight", &out_proj_weight_, {d_model_, d_inner_},
            uniform_initializer(inverse_sqrt(d_inner_ * n_layers_)), matrix);
  if (config_.bias)
    scope.add("out_proj.bias", &out_proj_bias_, {d_model_}, constant_initializer(0.0), no_weight_decay);
}

Variable MambaMixer::project(const Variable& x, int64_t begin, int64_t end) const {
  const Variable bias = in_proj_bias_.defined() ? in_proj_bias_.parameter_rows(begin, end) : Variable();
  return linear(x, in_proj_weight_.parameter_rows(begin, end), bias);
}

MixerOutput MambaMixer::forward(const Variable& x, const MixerState& state, const Tensor& resets) const {
  const int64_t batch = x.dim(0), length = x.dim(1), d_state = config_.d_state;
  const Variable u = project(x, 0, d_inner_);
  const Variable z = project(x, d_inner_, 2 * d_inner_);

  // Its result is computed again in the backward: a pass over u instead of a kept tensor of its size.
  const auto convolve = [=, this] {
    return causal_conv1d(u, conv1d_weight_.parameter_reshape({d_inner_, config_.d_conv}), conv1d_bias_,
                         state.empty() ? Variable() : state[0], resets, {.state_length = config_.d_conv});
  };
  const CausalConv1dOutput values = convolve();

  const auto select = [&, this](int64_t begin, int64_t end) {
    return linear(values.y, x_proj_weight_.parameter_rows(begin, end));
  };
  const Shape map_shape{batch, length, 1, d_state};
  const Variable dt = linear(select(0, dt_rank_), dt_proj_weight_);
  const Variable B = reshape(select(dt_rank_, dt_rank_ + d_state), map_shape);
  const Variable C = reshape(select(dt_rank_ + d_state, dt_rank_ + 2 * d_state), map_shape);
  SelectiveScanOutput mixed = selective_scan({.x = values.y,
                                              .dt = dt,
                                              .A = negative_exp(A_log_),
                                              .B = B,
                                              .C = C,
                                              .D = D_,
                                              .z = z,
                                              .dt_bias = dt_proj_bias_,
                                              .initial_state = state.empty() ? Variable() : state[1],
                                              .resets = resets});
  recompute_values({&mixed.y, &mixed.final_state}, {values.y},
                   [convolve] { return std::vector{convolve().y}; });
  return {linear(mixed.y, out_proj_weight_, out_proj_bias_), {values.final_state, mixed.final_state}};
}

int64_t MambaMixer::state_size() const {
  return d_inner_ * (config_.d_conv + config_.d_state);
}

double MambaMixer::flops_per_token() const {
  return static_cast<double>(d_inner_ * (2 * config_.d_conv + 9 * config_.d_state));
}

std::map<std::string, Variable> MambaMixer::published_state(const MixerState& state) const {
  return {{"final_conv_state", transpose_last(state[0])}, {"final_ssm_state", state[1]}};
}

}  // namespace headwater
