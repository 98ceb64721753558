// What a config file says, before anybody knows which option it is: a tree of scalars, sequences and maps
// that remembers where each piece stood. YAML, JSON and command-line overrides all become this.
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
/// (at most a third of its length, at least 1), else an empty string. Case-insensitive ties to the first.
std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace headwater
