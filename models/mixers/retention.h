// Retention (RetNet): linear attention with a constant decay per head, rotated queries and keys, a norm per head, and a
// gate.
//
// Sun et al. 2023, "Retentive Network", arXiv:2307.08621, and torchscale's MultiScaleRetention. The block: projections give
// queries, keys, values and the gate; queries and keys are rotated by their positions; per head, the recurrence with
// its own decay, 1 - 2^(-5 - h), divided by the root of what it would give for ones; an RMS norm of each head without
// weights; the gate; the output projection. These are
//
//   r[t] = sum over s <= t of gamma^(t - s) (q[t] . k[s]) v[s] / sqrt(d_key),    n[t] = sum over s <= t of gamma^(t - s)
//   y[t] = out_proj(gate(g[t]) * r[t] / sqrt(mean(r[t]^2) + norm_epsilon n[t]))
//
// Both factors are the rotation's to apply, to k and to q: r[t] / sqrt(n[t]) is then the engine's output and the norm a plain one.
//
// Differences from the authors' code: all forms have one epsilon, that of their parallel form (theirs disagree); the
// scores are not divided by the sum of their magnitudes, which keeps f16 in range and which the norm removes again; the
// rotation restarts with every document, since only differences of positions matter. The paper's GroupNorm subtracts the
// mean; the code has had this RMS norm since October 2023.
#pragma once

#include <optional>

#include "models/mixer.h"
#include "ops/chunked_matrix_state/chunked_matrix_state.h"
#include "ops/retention_schedule/retention_schedule.h"

namespace headwater {

struct RetentionConfig : MixerConfig {
  std::optional<int64_t> n_heads;
  std::optional<int64_t> d_value;
  std::string gate_fn = "swish";
  double norm_epsilon = 1e-6;
  int64_t chunk_len = 32;
  std::string form = "automatic";

  std::string type() const override { return "retention"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
};

class RetentionMixer : public Mixer {
 public:
  RetentionMixer(const RetentionConfig& config, int64_t d_model);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: the recurrence's, (batch, n_heads, d_key, d_value / n_heads), and the position of the next step in its document,
  /// i64 (batch), which is a constant. The former lies in the rotated frame of position 0.
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  int64_t state_size() const override;
  /// Of the engine alone, for each head 2 Q N + Q P + 4 N P with Q = chunk_len steps, N = d_key, P = d_value / n_heads.
  double flops_per_token() const override;

 private:
  MatrixStateOutput retain(const Variable& x, const RetentionSchedule& schedule, const MixerState& state,
                           const Tensor& resets) const;
  Variable gated_norm(const Variable& retained, const Variable& gate) const;

  const RetentionConfig config_;
  const int64_t d_model_, n_heads_, d_value_;
  const int64_t d_key_;  // of a head

  Variable q_proj_weight_;    // (d_model, d_model)
  Variable k_proj_weight_;    // (d_model, d_model)
  Variable v_proj_weight_;    // (d_value, d_model)
  Variable g_proj_weight_;    // (d_value, d_model)
  Variable out_proj_weight_;  // (d_model, d_value)
};

}  // namespace headwater
