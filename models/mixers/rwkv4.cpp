#include "models/mixers/rwkv4.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/error.h"
#include "ops/elementwise/elementwise.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"
#include "ops/token_shift/token_shift.h"
#include "ops/wkv/wkv.h"

namespace headwater {
namespace {

/// Element i is value(i).
Initializer indexed_initializer(std::function<double(int64_t)> value) {
  return [value = std::move(value)](const Tensor& target, RandomStream&) {
    dispatch_real(target.dtype(), "initialize", [&](auto element) {
      using T = decltype(element);
      for (int64_t i = 0; i < target.numel(); ++i) target.data<T>()[i] = static_cast<T>(value(i));
    });
  };
}

/// (i / n)^power + offset: the first channels look back, the last at the present step; deeper layers less so.
Initializer mix_initializer(int64_t n, double power, double offset = 0.0) {
  return indexed_initializer(
      [=](int64_t i) { return std::pow(static_cast<double>(i) / static_cast<double>(n), power) + offset; });
}

/// As the authors: a matrix that widens has longer columns.
Initializer widening_initializer(int64_t rows, int64_t columns) {
  return orthogonal_initializer(
      std::max(1.0, std::sqrt(static_cast<double>(rows) / static_cast<double>(columns))));
}

/// What the authors train at a multiple of the learning rate, without weight decay.
ParameterAttributes fast(double learning_rate_scale) {
  return {.weight_decay = false, .learning_rate_scale = learning_rate_scale};
}

// A product, a difference and a sum for each mix and channel; a gate's sigmoid counts as one operation.
constexpr double shift_flops = 4.0;
constexpr double gate_flops = 2.0;
// ops/wkv: the average and the update, each with one exponential and one division, and a logarithm.
constexpr double wkv_flops = 20.0;

}  // namespace

void Rwkv4Place::declare(Options& options) {
  options
      .optional_integer(
          "layer_id", &layer_id,
          "the layer that initial values are meant for, from 0; null: where it stands in the model")
      .at_least(0);
  options.optional_integer("n_layers", &n_layers, "of so many layers; null: the model's").at_least(1);
}

void Rwkv4Place::validate(const std::string& path) const {
  require(layer_id.has_value() == n_layers.has_value(),
          "{}: layer_id and n_layers go together; give both or neither", path);
  require(!layer_id || *layer_id < *n_layers, "{}.layer_id is {}; it must be below n_layers = {}", path,
          layer_id.value_or(0), n_layers.value_or(0));
}

Rwkv4Place Rwkv4Place::or_else(int64_t model_layer_id, int64_t model_n_layers) const {
  return {layer_id.value_or(model_layer_id), n_layers.value_or(model_n_layers)};
}

double Rwkv4Place::ratio_up() const {
  return *n_layers > 1 ? static_cast<double>(*layer_id) / static_cast<double>(*n_layers - 1) : 0.0;
}

double Rwkv4Place::ratio_down() const {
  return 1.0 - static_cast<double>(*layer_id) / static_cast<double>(*n_layers);
}

// ---- time mix

void Rwkv4TimeMixConfig::declare(Options& options) {
  options.optional_integer("dim_att", &dim_att, "channels of the weighted average; null: d_model")
      .at_least(1);
  place.declare(options);
}

void Rwkv4TimeMixConfig::validate(int64_t /*d_model*/, const std::string& path) const {
  place.validate(path);
}

std::unique_ptr<Mixer> Rwkv4TimeMixConfig::make(int64_t d_model, int64_t n_layers) const {
  return make_layer(d_model, n_layers, 0);
}

std::unique_ptr<Mixer> Rwkv4TimeMixConfig::make_layer(int64_t d_model, int64_t n_layers,
                                                      int64_t layer_id) const {
  return std::make_unique<Rwkv4TimeMix>(d_model, dim_att.value_or(d_model),
                                        place.or_else(layer_id, n_layers));
}

Rwkv4TimeMix::Rwkv4TimeMix(int64_t d_model, int64_t dim_att, const Rwkv4Place& place)
    : d_model_(d_model), dim_att_(dim_att), place_(place) {}

void Rwkv4TimeMix::declare_parameters(const ParameterScope& scope) {
  const double up = place_.ratio_up(), down = place_.ratio_down();
  scope.add("time_mix_k", &time_mix_k_, {d_model_}, mix_initializer(d_model_, down), no_weight_decay);
  scope.add("time_mix_v", &time_mix_v_, {d_model_}, mix_initializer(d_model_, down, 0.3 * up),
            no_weight_decay);
  scope.add("time_mix_r", &time_mix_r_, {d_model_}, mix_initializer(d_model_, down / 2), no_weight_decay);
  // Zeros, as the authors: every layer starts as the identity, and all steps have equal weights but for the decay.
  scope.add("key.weight", &key_weight_, {dim_att_, d_model_}, constant_initializer(0.0), matrix);
  scope.add("value.weight", &value_weight_, {dim_att_, d_model_}, widening_initializer(dim_att_, d_model_),
            matrix);
  // From a memory of a hundred steps (e^-5 a step) in the first channel to none beyond the last step (e^3).
  const double last = static_cast<double>(std::max<int64_t>(1, dim_att_ - 1));
  const auto decay = [=](int64_t i) {
    return -5.0 + 8.0 * std::pow(static_cast<double>(i) / last, 0.7 + 1.3 * up);
  };
  scope.add("time_decay", &time_decay_, {dim_att_}, indexed_initializer(decay), fast(2.0));
  // ln 0.3 and a zigzag, so that neighbouring channels differ.
  const auto first = [](int64_t i) { return std::log(0.3) + 0.5 * static_cast<double>((i + 1) % 3 - 1); };
  scope.add("time_first", &time_first_, {dim_att_}, indexed_initializer(first), fast(3.0));
  scope.add("receptance.weight", &receptance_weight_, {dim_att_, d_model_}, constant_initializer(0.0),
            matrix);
  scope.add("output.weight", &output_weight_, {d_model_, dim_att_}, constant_initializer(0.0), matrix);
}

MixerOutput Rwkv4TimeMix::forward(const Variable& x, const MixerState& state, const Tensor& resets) const {
  const bool has_state = !state.empty();
  const TokenShiftOutput shifted =
      token_shift(x, {time_mix_k_, time_mix_v_, time_mix_r_}, has_state ? state[0] : Variable(), resets);
  const Variable k = linear(shifted.y[0], key_weight_);
  const Variable v = linear(shifted.y[1], value_weight_);
  const Variable r = linear(shifted.y[2], receptance_weight_);
  const WkvOutput average = wkv({.k = k,
                                 .v = v,
                                 .time_decay = time_decay_,
                                 .time_first = time_first_,
                                 .initial_state = has_state ? state[1] : Variable(),
                                 .resets = resets});
  const Variable y = linear(sigmoid_mul(r, average.y), output_weight_);
  return {y, {shifted.final_state, average.final_state}};
}

int64_t Rwkv4TimeMix::state_size() const {
  return d_model_ + 2 * dim_att_;
}

double Rwkv4TimeMix::flops_per_token() const {
  return 3.0 * shift_flops * static_cast<double>(d_model_) +
         (wkv_flops + gate_flops) * static_cast<double>(dim_att_);
}

std::map<std::string, Variable> Rwkv4TimeMix::published_state(const MixerState& state) const {
  const Variable& average = state[1];
  // One of the state's two rows: a product with (1, 0) or (0, 1), which is exact.
  const auto row = [&](const std::vector<double>& which) {
    const Tensor weight = Tensor::from_vector<double>({1, 2}, which).to(average.dtype()).to(average.device());
    return reshape(linear(transpose_last(average), Variable(weight)), {average.dim(0), dim_att_});
  };
  const Variable aa = row({1.0, 0.0}), pp = row({0.0, 1.0});
  return {{"att_xx", state[0]},
          {"att_aa", aa},
          {"att_bb", Variable(Tensor::full(aa.shape(), 1.0, aa.dtype(), aa.device()))},
          {"att_pp", pp}};
}

// ---- channel mix

void Rwkv4ChannelMixConfig::declare(Options& options) {
  options.optional_integer("dim_ffn", &dim_ffn, "hidden width; null: 4 d_model").at_least(1);
  place.declare(options);
}

void Rwkv4ChannelMixConfig::validate(int64_t /*d_model*/, const std::string& path) const {
  place.validate(path);
}

std::unique_ptr<Mixer> Rwkv4ChannelMixConfig::make(int64_t d_model, int64_t n_layers) const {
  return make_layer(d_model, n_layers, 0);
}

std::unique_ptr<Mixer> Rwkv4ChannelMixConfig::make_layer(int64_t d_model, int64_t n_layers,
                                                         int64_t layer_id) const {
  return std::make_unique<Rwkv4ChannelMix>(d_model, dim_ffn.value_or(4 * d_model),
                                           place.or_else(layer_id, n_layers));
}

Rwkv4ChannelMix::Rwkv4ChannelMix(int64_t d_model, int64_t dim_ffn, const Rwkv4Place& place)
    : d_model_(d_model), dim_ffn_(dim_ffn), place_(place) {}

void Rwkv4ChannelMix::declare_parameters(const ParameterScope& scope) {
  const double down = place_.ratio_down();
  scope.add("time_mix_k", &time_mix_k_, {d_model_}, mix_initializer(d_model_, down), no_weight_decay);
  scope.add("time_mix_r", &time_mix_r_, {d_model_}, mix_initializer(d_model_, down), no_weight_decay);
  scope.add("key.weight", &key_weight_, {dim_ffn_, d_model_}, widening_initializer(dim_ffn_, d_model_),
            matrix);
  // Zeros, as in the time mix: the layer starts as the identity.
  scope.add("value.weight", &value_weight_, {d_model_, dim_ffn_}, constant_initializer(0.0), matrix);
  scope.add("receptance.weight", &receptance_weight_, {d_model_, d_model_}, constant_initializer(0.0),
            matrix);
}

MixerOutput Rwkv4ChannelMix::forward(const Variable& x, const MixerState& state, const Tensor& resets) const {
  const TokenShiftOutput shifted =
      token_shift(x, {time_mix_k_, time_mix_r_}, state.empty() ? Variable() : state[0], resets);
  const Variable hidden = squared_relu(linear(shifted.y[0], key_weight_));
  const Variable value = linear(hidden, value_weight_);
  const Variable r = linear(shifted.y[1], receptance_weight_);
  return {sigmoid_mul(r, value), {shifted.final_state}};
}

int64_t Rwkv4ChannelMix::state_size() const {
  return d_model_;
}

double Rwkv4ChannelMix::flops_per_token() const {
  return (2.0 * shift_flops + gate_flops) * static_cast<double>(d_model_) +
         2.0 * static_cast<double>(dim_ffn_);
}

std::map<std::string, Variable> Rwkv4ChannelMix::published_state(const MixerState& state) const {
  return {{"ffn_xx", state[0]}};
}

}  // namespace headwater
