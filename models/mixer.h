// What every family is to the rest of the program.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "autograd/parameters.h"
#include "core/options.h"

namespace headwater {

/// The state that a mixer carries along the sequence: a few tensors with a leading batch axis. Empty: zero state.
using MixerState = std::vector<Variable>;

struct MixerOutput {
  Variable y;
  MixerState state;
};

/// One sequence mixer: (x, state_in, resets) -> (y, state_out), with parameters. Decoding is that with length 1.
class Mixer {
 public:
  virtual ~Mixer() = default;

  /// Declares the parameters under the names that the authors' checkpoints use.
  virtual void declare_parameters(const ParameterScope& scope) = 0;

  /// Shapes   x, y: (batch, length, d_model)   resets: i32 (batch, length), may be undefined: 1 where a document starts.
  /// State    empty (start from zero), or what a forward of the same batch returned.
  virtual MixerOutput forward(const Variable& x, const MixerState& state, const Tensor& resets) const = 0;

  /// Numbers of state per sequence.
  virtual int64_t state_size() const = 0;

  /// Floating-point operations of a forward for one token of a long sequence, besides the products with matrices.
  virtual double flops_per_token() const = 0;

  /// A state that forward returned, in the authors' layout and under their names, differentiably: what golden
  /// cases record and other programs expect. Empty where nothing is published.
  virtual std::map<std::string, Variable> published_state(const MixerState& /*state*/) const { return {}; }
};

/// The options of a family under `model.mixer` in YAML.
class MixerConfig {
 public:
  virtual ~MixerConfig() = default;
  /// The name under which YAML asks for the family.
  virtual std::string type() const = 0;
  virtual void declare(Options& options) = 0;
  /// Throws an input error, beginning with `path`, for sizes that do not fit together.
  virtual void validate(int64_t d_model, const std::string& path) const = 0;
  /// Whether y[t] depends on x[0..t] alone, so that a sequence can be fed in pieces and a language model built of it.
  virtual bool is_causal() const { return true; }
  /// `n_layers` of the model: initial values of output projections depend on it.
  virtual std::unique_ptr<Mixer> make(int64_t d_model, int64_t n_layers) const = 0;
  /// The same for layer number `layer_id` of the model, for families whose initial values depend on it.
  virtual std::unique_ptr<Mixer> make_layer(int64_t d_model, int64_t n_layers, int64_t /*layer_id*/) const {
    return make(d_model, n_layers);
  }
};

/// The families, by name. Throws an input error with the known names for an unknown one.
std::shared_ptr<MixerConfig> make_mixer_config(const std::string& type);
std::vector<std::string> mixer_types();

}  // namespace headwater
