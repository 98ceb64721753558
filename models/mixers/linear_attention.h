// Linear attention: softmax's exponential of a product replaced by a product of positive features, so that causal attention
// is a recurrence over one matrix per head.
//
// Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236. The block: projections give queries, keys and
// values; a feature map makes queries and keys positive; each output is the mean of the values so far, weighted by the
// products of the query's and the keys' features; the output projection. Without `causal` the mean is over the whole
// sequence.
//
// The sum of the weights is one more value channel, of ones, through the engine: the state's last column. In bf16 it is
// rounded to bf16 with the other columns; the state itself is f32.
//
// Differences from the authors' code: document borders and states work in every form; widths per head are options, as
// is the normaliser; there is no mask for padding.
#pragma once

#include <optional>

#include "models/mixer.h"
#include "ops/chunked_matrix_state/chunked_matrix_state.h"

namespace headwater {

struct LinearAttentionConfig : MixerConfig {
  std::optional<int64_t> n_heads;
  std::optional<int64_t> d_keys;
  std::optional<int64_t> d_values;
  std::string feature_map = "elu";
  bool causal = true;
  bool normalize = true;
  double epsilon = 1e-6;
  bool bias = true;
  int64_t chunk_len = 32;
  std::string form = "automatic";

  std::string type() const override { return "linear_attention"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  bool is_causal() const override { return causal; }
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
};

class LinearAttentionMixer : public Mixer {
 public:
  LinearAttentionMixer(const LinearAttentionConfig& config, int64_t d_model);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: (batch, n_heads, d_keys, d_values + 1), the last column the sum of the keys' features; without `normalize`
  /// (batch, n_heads, d_keys, d_values). Not causal: none, and a state or resets are input errors.
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  int64_t state_size() const override;
  /// Of the engine alone, for each head 2 Q N + Q P + 4 N P with Q = chunk_len steps, N = d_keys and P the state's columns;
  /// twice that if not causal.
  double flops_per_token() const override;

 private:
  Variable features(const Variable& x) const;
  MatrixStateOutput attend(const Variable& q, const Variable& k, const Variable& v, const MixerState& state,
                           const Tensor& resets) const;

  const LinearAttentionConfig config_;
  const int64_t d_model_, n_heads_, d_keys_, d_values_;

  Variable query_weight_;  // (n_heads * d_keys, d_model)
  Variable query_bias_;    // (n_heads * d_keys), if bias, as the others
  Variable key_weight_;    // (n_heads * d_keys, d_model)
  Variable key_bias_;      // (n_heads * d_keys)
  Variable value_weight_;  // (n_heads * d_values, d_model)
  Variable value_bias_;    // (n_heads * d_values)
  Variable out_weight_;    // (d_model, n_heads * d_values)
  Variable out_bias_;      // (d_model)
};

}  // namespace headwater
