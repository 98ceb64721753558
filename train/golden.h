// Golden cases: recorded inputs, parameters, outputs and gradients of one mixer or one operator, and how each
// target is computed here. The files' format: tests/golden/README.md.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "core/safetensors.h"
#include "models/mixer.h"

namespace headwater {

/// What a case is computed with, and where.
struct Placement {
  DType dtype = DType::f32;
  Device device = {};
};

/// A recorded case; its metadata has been checked.
struct GoldenFile {
  /// Throws an input error that names the file, and the key or tensor, for anything but a golden case of format
  /// "ssm-golden/1".
  static GoldenFile open(const Path& path);

  bool contains(const std::string& name) const { return file.contains(name); }
  /// A copy of a tensor of real numbers in this dtype. Throws an input error that names file and tensor if it is
  /// missing, of integers, or holds a number that is not finite.
  Tensor real(const std::string& name, DType dtype) const;
  Tensor real(const std::string& name, const Placement& placement) const {
    return real(name, placement.dtype).to(placement.device);
  }
  /// The names that begin with `prefix` ("param."), without it.
  std::vector<std::string> names(const std::string& prefix) const;
  /// i32 (batch, length): 1 where a document starts, from `input.reset` or from changes of `input.seq_idx`;
  /// undefined if the file has neither.
  Tensor resets() const;

  SafetensorsFile file;
  Path path;
  std::string target;  ///< "mixer:mamba2", "op:ssd"
  ConfigValue config;  ///< a map
  double rtol = 0.0;   ///< a tensor may differ by atol + rtol * max |golden|
  double atol = 0.0;
};

/// One way to compute a case. All of them must give the same numbers.
struct GoldenForm {
  /// How the sequence is fed: whole, in two pieces, or step by step, the state handed over in between.
  enum class Feed { whole, pieces, steps };

  std::string name;                       ///< "chunked 16"
  std::string engine = "automatic";       ///< or "chunked", "recurrent", where a target has these
  std::optional<int64_t> chunk_len = {};  ///< absent: as the file says
  Feed feed = Feed::whole;
  bool with_gradients = true;  ///< false: nothing is recorded, which is how a model decodes
};

using NamedVariables = std::map<std::string, Variable>;

/// A case made ready to run in one form. Every tensor is in the layout in which the file has it.
struct GoldenCase {
  struct Sequence {
    std::string name;
    int time_axis = 1;
    bool is_optional = false;
  };
  struct Output {
    NamedVariables sequences;  ///< each among `outputs`
    MixerState state;          ///< what the next piece goes on from
  };

  std::vector<Sequence> inputs;           ///< cut along time where the sequence is fed in pieces
  std::vector<std::string> other_inputs;  ///< given whole to every piece; all optional
  std::vector<Sequence> outputs;          ///< joined along time
  NamedVariables parameters;              ///< filled from the file, each with a gradient
  /// The next piece. `state` is empty at the start of the sequence only: other inputs (an initial state) count
  /// then.
  std::function<Output(const NamedVariables& inputs, const MixerState& state, const Tensor& resets)> run;
  /// What else the file records as outputs: the state after the last piece.
  std::function<NamedVariables(const MixerState&)> final_outputs = [](const MixerState&) {
    return NamedVariables();
  };
};

/// A target that this build does not have.
struct Unsupported {
  std::string reason;
};

/// How one target is computed.
struct GoldenAdapter {
  std::string target;
  /// The forms that a file asks for, or why it cannot be computed.
  std::function<std::variant<std::vector<GoldenForm>, Unsupported>(const GoldenFile&)> forms;
  std::function<GoldenCase(const GoldenFile&, const GoldenForm&, const Placement&)> make;
};

/// One line per operator; every registered mixer has one too. nullptr for a target that nobody has built yet.
const GoldenAdapter* find_golden_adapter(const std::string& target);

}  // namespace headwater
