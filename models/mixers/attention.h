// Causal softmax attention with rotary positions: the baseline, and the other kind of layer in hybrids.
//
// Vaswani et al. 2017, arXiv:1706.03762; rotary positions: Su et al. 2021, arXiv:2104.09864; grouped queries: Ainslie et
// al. 2023, arXiv:2305.13245; the block with its optional convolution as in Dao & Gu 2024, arXiv:2405.21060, section 9.2.
// From bottom to top: one projection gives queries, keys and values; optionally a short causal convolution over all three,
// without activation; queries and keys are rotated by angles of their positions; softmax over the keys of the same
// document, and of the last window_size + 1 steps; the output projection.
//
// Differences from the authors' code: documents, windows and keys of earlier pieces work in every form, and positions begin
// again with a document, which leaves scores as they are and angles small. causal: false is refused: a mixer here hands a
// state along the sequence. Dropout of probabilities is left out.
#pragma once

#include <optional>
#include <string>

#include "models/mixer.h"

namespace headwater {

struct AttentionConfig : MixerConfig {
  int64_t n_heads = 0;
  std::optional<int64_t> n_kv_heads;
  std::optional<int64_t> head_dim;
  bool qkv_proj_bias = false;
  bool out_proj_bias = false;
  std::optional<double> softmax_scale;
  bool causal = true;
  int64_t d_conv = 0;
  int64_t rotary_dim = 0;
  double rotary_base = 10000.0;
  bool rotary_interleaved = false;
  int64_t window_size = -1;

  std::string type() const override { return "attention"; }
  void declare(Options& options) override;
  void validate(int64_t d_model, const std::string& path) const override;
  std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const override;
};

class AttentionMixer : public Mixer {
 public:
  AttentionMixer(const AttentionConfig& config, int64_t d_model, int64_t n_layers);

  void declare_parameters(const ParameterScope& scope) override;
  /// State: rotated keys and values of the tokens so far, (batch, tokens, n_kv_heads, head_dim) each, with a window of the
  /// last window_size only (at least one); how many tokens of its present document each sequence has seen, i32 (batch);
  /// with a convolution, its last d_conv - 1 inputs, (batch, d_conv - 1, channels) each for queries, keys and values.
  /// Without a window it grows with every piece, documents that have ended included: a stream or train.state_passing
  /// wants a window.
  MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const override;
  /// With a window, of a full one. Without, keys and values grow with the tokens: those of one token are counted.
  int64_t state_size() const override;
  /// Of scores and weighted values, 4 n_heads head_dim for each key seen: with a window, window_size + 1 keys; without, the
  /// keys grow with the tokens, and one is counted.
  double flops_per_token() const override;

 private:
  /// Of queries, keys and values.
  struct Heads {
    Variable q, k, v;
  };
  Heads project(const Variable& x) const;
  /// The windows for the next piece are appended to `state_out`.
  Heads convolve(const Heads& in, const MixerState& state, const Tensor& resets, MixerState& state_out) const;
  Variable rotate(const Variable& heads, const Tensor& positions) const;

  const AttentionConfig config_;
  const int64_t d_model_, n_layers_;
  const int64_t n_kv_heads_, head_dim_, d_q_, d_kv_;  // d_q, d_kv: columns of queries, and of keys or values

  Variable in_proj_weight_;   // (d_q + 2 d_kv, d_model): rows of all queries, all keys, all values
  Variable in_proj_bias_;     // (the same rows), if qkv_proj_bias
  Variable conv1d_weight_;    // (d_q + 2 d_kv, 1, d_conv), if d_conv
  Variable conv1d_bias_;      // (d_q + 2 d_kv), if d_conv
  Variable out_proj_weight_;  // (d_model, d_q)
  Variable out_proj_bias_;    // (d_model), if out_proj_bias
};

}  // namespace headwater
