// Mamba-2: a gated block around the SSD recurrence, one scalar decay per head and step.
//
// Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060. The block, from bottom to top: one projection gives the
// gate z, the values x, the maps B and C and the step sizes dt; x, B and C pass a short causal convolution with SiLU;
// the SSD recurrence; RMSNorm gated by z; the output projection. With d_ssm < expand * d_model the remaining channels
// form a gated MLP beside the recurrence.
//
// Differences from the authors' code: dt_limit holds while decoding too (theirs forgets it there); document borders,
// initial and final states work in every form.
#pragma once

#include <array>
#include <optional>

#include "models/mixer.h"
#include "ops/chunked_matrix_state/chunked_matrix_state.h"

namespace headwater {

struct Mamba2Config : MixerConfig {
  int64_t d_state = 128;
  int64_t head_dim = 64;
  int64_t d_conv = 4;
  std::optional<double> conv_init;
  int64_t expand = 2;
  std::optional<int64_t> d_ssm;
  int64_t n_groups = 1;
  std::array<double, 2> A_init_range = {1.0, 16.0};
  bool D_has_hdim = false;
  bool rmsnorm = true;
  bool norm_before_gate = false;
  std::optional<int64_t> norm_groups;
  double dt_min = 0.001;
  double dt_max = 0.1;
  double dt_init_floor = 1e-4;
  std::array<std::optional<double>, 2> dt_limit = {0.0, std::nullopt};
  bool bias = false;
  bool conv_bias = true;
  int64_t chunk_len = 32;
  bool learnable_init_states = false;
  std::string form = "automatic";

  std::string type() const override { return "mamba2"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
};

class Mamba2Mixer : public Mixer {
 public:
  Mamba2Mixer(const Mamba2Config& config, int64_t d_model, int64_t n_layers);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: the last d_conv inputs of the convolution, (batch, d_conv, channels) each for x, B and C, and the SSD state,
  /// (batch, n_heads, d_state, head_dim).
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  int64_t state_size() const override;
  /// Of the SSD alone: 2 Q N for each group, Q P + 4 N P for each head, with Q = chunk_len steps (Dao & Gu 2024, section 6).
  double flops_per_token() const override;
  /// final_conv_state: (batch, channels of x, B and C, d_conv), final_ssm_state: (batch, n_heads, head_dim,
  /// d_state).
  std::map<std::string, Variable> published_state(const MixerState& state) const override;

 private:
  /// Consecutive rows of in_proj.
  struct Projections {
    Variable z0, x0, z, x, B, C, dt;
  };
  Projections project(const Variable& x) const;
  Variable initial_ssm_state(const MixerState& state, int64_t batch) const;

  const Mamba2Config config_;
  const int64_t d_model_, n_layers_;
  const int64_t d_inner_, d_ssm_, d_mlp_, n_heads_, d_bc_;  // d_bc: n_groups * d_state, columns of B and of C

  Variable in_proj_weight_;   // (2 d_mlp + 2 d_ssm + 2 d_bc + n_heads, d_model): rows z0, x0, z, x, B, C, dt
  Variable in_proj_bias_;     // (the same rows), if bias
  Variable conv1d_weight_;    // (d_ssm + 2 d_bc, 1, d_conv): rows x, B, C
  Variable conv1d_bias_;      // (d_ssm + 2 d_bc), if conv_bias
  Variable dt_bias_;          // (n_heads)
  Variable A_log_;            // (n_heads), A = -exp(A_log)
  Variable init_states_;      // (n_heads, head_dim, d_state), if learnable_init_states
  Variable D_;                // (n_heads), or (d_ssm) if D_has_hdim
  Variable norm_weight_;      // (d_ssm), if rmsnorm
  Variable out_proj_weight_;  // (d_model, d_inner)
  Variable out_proj_bias_;    // (d_model), if bias
};

}  // namespace headwater
