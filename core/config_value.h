// What a config file says, before anybody knows which option it is: a tree of scalars, sequences and maps
// that remembers where each piece stood. YAML, JSON and command-line overrides all become this.
// A map's entry stands where its key stands: that is the line that a reader of a complaint looks for.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace headwater {

struct ConfigValue {
  enum class Kind { null, scalar, sequence, map };

  Kind kind = Kind::null;
  std::string text;     ///< of a scalar, as written
  bool quoted = false;  ///< a quoted scalar is text, whatever it looks like
  std::string source;   ///< "configs/mamba2_small.yaml" or "command line"
  int line = 0;         ///< 1-based; 0 where the source has no lines
  int column = 0;
  std::vector<ConfigValue> items;                            ///< of a sequence
  std::vector<std::pair<std::string, ConfigValue>> entries;  ///< of a map, in file order; keys are unique

  /// The entry under `key` of a map, or nullptr.
  const ConfigValue* find(const std::string& key) const;
  ConfigValue* find(const std::string& key);
  /// "configs/mamba2_small.yaml:14", or the source alone where it has no lines: how every complaint begins.
  std::string where() const;
};

/// The candidate with the smallest edit distance to `name` if it is near enough to be a slip of the keyboard
/// (at most a third of its length, at least 1), else an empty string. An edit inserts, deletes or replaces a
/// letter or swaps two neighbours; case makes no difference; of equally near candidates the first is taken.
std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates);

/// "train" and "steps" make "train.steps"; an empty path adds nothing.
std::string join_path(const std::string& path, const std::string& name);

/// The value on one line, as YAML flow text: "{type: mamba2, betas: [0.9, 0.95]}".
std::string flow_text(const ConfigValue& value);

/// What turns `before` into `after`, a line for each scalar or list of scalars: "train.batch: 8 -> 16". The
/// order of keys, and quotes that change nothing, make no difference.
std::vector<std::string> config_changes(const ConfigValue& before, const ConfigValue& after);

}  // namespace headwater
