// RWKV-4: a block without attention, in two layers that both look one step back.
//
// Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048. The time mix: x mixed with the
// step before gives keys, values and receptances; the decaying weighted average of the values (ops/wkv), gated by
// sigmoid(receptance), passes the output matrix. The channel mix: x mixed with the step before gives a hidden layer with
// squared ReLU, and receptances whose sigmoid gates what comes out of it.
//
// Differences from the authors' code: any length, gradients through the state, document borders; the state of the average
// is (average, logarithm of its weight), which is (aa, bb, pp) = (average, 1, logarithm) in theirs; a model of one layer
// has a place between the first and the last, where theirs divides by zero. `rescale_every`, a device of fp16 inference,
// is not needed: there is no fp16.
#pragma once

#include <optional>

#include "models/mixer.h"

namespace headwater {

/// Where a layer stands in the model: initial values depend on it.
struct Rwkv4Place {
  std::optional<int64_t> layer_id;
  std::optional<int64_t> n_layers;

  void declare(Options& options);
  void validate(const std::string& path) const;
  /// This place, or where it is null, that which the model gives.
  Rwkv4Place or_else(int64_t model_layer_id, int64_t model_n_layers) const;
  double ratio_up() const;    ///< 0 in the first layer, 1 in the last
  double ratio_down() const;  ///< 1 in the first layer, almost 0 in the last
};

struct Rwkv4TimeMixConfig : MixerConfig {
  std::optional<int64_t> dim_att;
  Rwkv4Place place;

  std::string type() const override { return "rwkv4_time_mix"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
  std::unique_ptr<Mixer> make_layer(int64_t d_model, int64_t n_layers, int64_t layer_id) const override;
};

class Rwkv4TimeMix : public Mixer {
 public:
  Rwkv4TimeMix(int64_t d_model, int64_t dim_att, const Rwkv4Place& place);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: the last x, (batch, d_model), and that of the average, (batch, 2, dim_att).
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  int64_t state_size() const override;
  double flops_per_token() const override;
  /// att_xx, (batch, d_model), and att_aa, att_bb, att_pp, (batch, dim_att) each.
  std::map<std::string, Variable> published_state(const MixerState& state) const override;

 private:
  const int64_t d_model_, dim_att_;
  const Rwkv4Place place_;

  Variable time_mix_k_, time_mix_v_, time_mix_r_;  // (d_model)
  Variable key_weight_, value_weight_;             // (dim_att, d_model)
  Variable time_decay_;                            // (dim_att), a step decays by exp(-exp(time_decay))
  Variable time_first_;                            // (dim_att)
  Variable receptance_weight_;                     // (dim_att, d_model)
  Variable output_weight_;                         // (d_model, dim_att)
};

struct Rwkv4ChannelMixConfig : MixerConfig {
  std::optional<int64_t> dim_ffn;
  Rwkv4Place place;

  std::string type() const override { return "rwkv4_channel_mix"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
  std::unique_ptr<Mixer> make_layer(int64_t d_model, int64_t n_layers, int64_t layer_id) const override;
};

class Rwkv4ChannelMix : public Mixer {
 public:
  Rwkv4ChannelMix(int64_t d_model, int64_t dim_ffn, const Rwkv4Place& place);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: the last x, (batch, d_model).
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  int64_t state_size() const override;
  double flops_per_token() const override;
  /// ffn_xx, (batch, d_model).
  std::map<std::string, Variable> published_state(const MixerState& state) const override;

 private:
  const int64_t d_model_, dim_ffn_;
  const Rwkv4Place place_;

  Variable time_mix_k_, time_mix_r_;  // (d_model)
  Variable key_weight_;               // (dim_ffn, d_model)
  Variable value_weight_;             // (d_model, dim_ffn)
  Variable receptance_weight_;        // (d_model, d_model)
};

}  // namespace headwater
