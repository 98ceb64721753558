// A language model: embedding, residual blocks of any mixers, final norm, head.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "autograd/parameters.h"
#include "core/options.h"
#include "models/mixer.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"

namespace headwater {

/// `repeat` equal layers in a row.
struct LayerConfig {
  std::shared_ptr<MixerConfig> mixer;
  int64_t d_intermediate = 0;  ///< hidden width of a gated MLP (SwiGLU) after the mixer; 0: none
  int64_t repeat = 1;
  std::shared_ptr<MixerConfig> mlp = {};  ///< a second mixer, in the place of the MLP; null: none
};

/// The options under `model` in YAML. Layers are either n_layers times `mixer`, or the list `layers`:
///
///   layers: [{mixer: {type: mamba2}, repeat: 5}, {mixer: {type: attention}, d_intermediate: 512}]
struct LanguageModelConfig {
  std::optional<int64_t> vocab_size;  ///< null: the tokenizer's, rounded up to a multiple of 16
  int64_t d_model = 256;
  int64_t n_layers = 4;
  bool tie_embeddings = true;
  std::string norm = "rms_norm";
  double norm_epsilon = 1e-5;
  bool norm_embeddings = false;
  std::optional<double> embedding_range;
  double drop_prob = 0.0;
  int64_t d_intermediate = 0;
  std::shared_ptr<MixerConfig> mixer, mlp;
  std::vector<LayerConfig> layers;  ///< empty: n_layers times {mixer, mlp, d_intermediate}

  LanguageModelConfig();
  void declare(Options& options);
  /// Throws an input error for sizes that do not fit together. `path` is where the options stand ("model").
  void validate(const std::string& path) const;
  /// Every layer spelled out.
  std::vector<LayerConfig> expanded_layers() const;
};

/// The state of every mixer, in the order of use; empty: zero state.
using LanguageModelState = std::vector<MixerState>;

struct LanguageModelOptions {
  bool recompute_blocks = false;  ///< keep only each block's input for the backward, compute the rest again
  uint64_t dropout_seed = 0;
  uint64_t dropout_offset = 0;  ///< step of the run: each step draws its own masks
  bool dropout = false;         ///< off while evaluating
};

/// Parameters carry the names of the Hugging Face Mamba-2 layout:
///   backbone.embeddings.weight (vocab_size, d_model)
///   backbone.layers.I.norm.weight (d_model), backbone.layers.I.mixer.*  and, with an MLP,
///   backbone.layers.I.norm2.weight, .mlp.fc1.weight (2 d_intermediate, d_model): rows up, then gate, .mlp.fc2.weight
///   backbone.norm_f.weight (d_model), lm_head.weight (vocab_size, d_model) unless tied.
/// With layer_norm, beside each norm's weight its bias (d_model); with norm_embeddings also backbone.norm_embeddings.*;
/// with a mixer in the place of the MLP, that mixer's parameters in backbone.layers.I.mlp.*.
class LanguageModel {
 public:
  /// Allocates parameters, all zero: call initialize() or fill them from a checkpoint. `dtype` is what layers compute
  /// with: f32, f64, or bf16 (on a GPU), with f32 parameters (see ParameterStore) and an f32 residual stream.
  /// Throws an input error if the config has no vocab_size or does not validate.
  LanguageModel(const LanguageModelConfig& config, DType dtype, Device device = {});
  /// How many parameters such a model has; allocates none of them.
  static int64_t count_parameters(const LanguageModelConfig& config);

  /// Draws initial values; the same seed gives the same model.
  void initialize(uint64_t seed) { store_.initialize(seed); }

  struct Hidden {
    Variable hidden;  ///< (batch, length, d_model), after the final norm
    LanguageModelState state;
  };
  /// tokens, resets: i32 (batch, length), on any device; resets may be undefined. `state` as an earlier forward returned
  /// it.
  Hidden forward(const Tensor& tokens, const LanguageModelState& state, const Tensor& resets,
                 const LanguageModelOptions& options = {}) const;
  /// (..., d_model) -> (..., vocab_size).
  Variable logits(const Variable& hidden) const;
  /// Mean loss over targets (on any device) that are not ignored_target, without holding all logits.
  LinearCrossEntropyOutput loss(const Variable& hidden, const Tensor& targets,
                                const LinearCrossEntropyOptions& options = {}) const;

  const LanguageModelConfig& config() const { return config_; }
  ParameterStore& parameters() { return store_; }
  const ParameterStore& parameters() const { return store_; }
  int64_t vocab_size() const { return *config_.vocab_size; }
  /// What layers compute with.
  DType dtype() const { return dtype_; }
  Device device() const { return store_.values().device(); }
  /// Numbers of recurrent state per sequence, all layers.
  int64_t state_size() const;
  /// Floating-point operations of a forward per token: 2 for each element of a matrix (an embedding that is only looked up
  /// has none), and those of the mixers. A training step has three times as many.
  double flops_per_token() const;

 private:
  struct Norm {
    Variable weight;  // (d_model)
    Variable bias;    // (d_model), with layer_norm
  };
  /// A norm and a mixer; behind them perhaps another norm and a gated MLP. A layer with two mixers is two blocks.
  struct Block {
    std::unique_ptr<Mixer> mixer;
    int64_t d_intermediate = 0;
    Norm norm, norm2;
    Variable fc1_weight, fc2_weight;
  };
  /// Declares everything, allocates nothing.
  explicit LanguageModel(const LanguageModelConfig& config);
  void declare_norm(const ParameterScope& scope, Norm& norm) const;
  Variable apply_norm(const Norm& norm, const Variable& x, DType output_dtype) const;
  void add_layer(const LayerConfig& layer, int64_t index, int64_t n_layers);
  void declare_mlp(Block& block, const ParameterScope& scope, int64_t n_layers);
  MixerOutput run_block(const Block& block, int64_t index, const Variable& x, const MixerState& state,
                        const Tensor& resets, const LanguageModelOptions& options) const;
  MixerOutput recompute_block(const Block& block, int64_t index, const Variable& x, const MixerState& state,
                              const Tensor& resets, const LanguageModelOptions& options) const;
  Variable drop(const Variable& x, int64_t place, const LanguageModelOptions& options) const;
  const Variable& head_weight() const { return config_.tie_embeddings ? embeddings_ : head_weight_; }

  const LanguageModelConfig config_;
  DType dtype_ = DType::f32;
  ParameterStore store_;
  std::vector<std::unique_ptr<Block>> blocks_;
  Variable embeddings_, head_weight_;
  Norm embedding_norm_, final_norm_;
};

}  // namespace headwater
