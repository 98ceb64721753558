// Mamba: a gated block around a selective state space (S6), a diagonal recurrence for every channel.
//
// Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752. The block, from
// bottom to top: one projection gives the channels and their gate z; the channels pass a short causal convolution with
// SiLU; from its result come, by another projection, the maps B and C and, through a narrow one, a step size for each
// channel; the selective scan with a skip D; the gate silu(z); the output projection.
//
// Differences from the authors' code: document borders, initial and final states, with gradients, and prefill in any
// pieces; step sizes are f32 beside bf16 activations, as A, D and the state are; gradients are deterministic.
#pragma once

#include <optional>

#include "models/mixer.h"

namespace headwater {

struct MambaConfig : MixerConfig {
  int64_t d_state = 16;
  int64_t d_conv = 4;
  int64_t expand = 2;
  std::optional<int64_t> dt_rank;
  double dt_min = 0.001;
  double dt_max = 0.1;
  std::string dt_init = "random";
  double dt_scale = 1.0;
  double dt_init_floor = 1e-4;
  bool conv_bias = true;
  bool bias = false;

  std::string type() const override { return "mamba"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
};

class MambaMixer : public Mixer {
 public:
  MambaMixer(const MambaConfig& config, int64_t d_model, int64_t n_layers);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: the last d_conv inputs of the convolution, (batch, d_conv, d_inner), and that of the scan, (batch, d_inner,
  /// d_state).
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  int64_t state_size() const override;
  /// Of the convolution, 2 d_conv, and of the scan, 9 d_state, for each channel.
  double flops_per_token() const override;
  /// final_conv_state: (batch, d_inner, d_conv), final_ssm_state: (batch, d_inner, d_state).
  std::map<std::string, Variable> published_state(const MixerState& state) const override;

 private:
  /// Rows [begin, end) of in_proj, applied to x.
  Variable project(const Variable& x, int64_t begin, int64_t end) const;

  const MambaConfig config_;
  const int64_t d_model_, n_layers_;
  const int64_t d_inner_, dt_rank_;

  Variable in_proj_weight_;   // (2 d_inner, d_model): rows of the channels, then of z
  Variable in_proj_bias_;     // (2 d_inner), if bias
  Variable conv1d_weight_;    // (d_inner, 1, d_conv)
  Variable conv1d_bias_;      // (d_inner), if conv_bias
  Variable x_proj_weight_;    // (dt_rank + 2 d_state, d_inner): rows of dt, B, C
  Variable dt_proj_weight_;   // (d_inner, dt_rank)
  Variable dt_proj_bias_;     // (d_inner)
  Variable A_log_;            // (d_inner, d_state), A = -exp(A_log)
  Variable D_;                // (d_inner)
  Variable out_proj_weight_;  // (d_model, d_inner)
  Variable out_proj_bias_;    // (d_model), if bias
};

}  // namespace headwater
