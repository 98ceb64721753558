// Grows a tree of ConfigValue from the events of a parser, whatever the format.
#pragma once

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/config_value.h"

namespace headwater {

/// How deep lists and maps may be nested; what recurses over a config needs no more stack than that.
constexpr size_t max_config_depth = 64;

/// Takes values depth first, a map's keys before their values. Refuses duplicate keys and deep nesting while
/// the tree grows, so that neither costs memory or stack. All errors are input errors.
class ConfigTreeBuilder {
 public:
  explicit ConfigTreeBuilder(std::string source) : source_(std::move(source)) {}

  /// A value at a position, without content.
  ConfigValue make(ConfigValue::Kind kind, int line, int column) const;

  /// Begins a list or a map; close() ends it and returns it, to be added to what is around it.
  void open(ConfigValue list_or_map);
  ConfigValue close();

  void add(ConfigValue value);
  void add_key(const ConfigValue& key);

  /// Whether the next value is a key: the innermost open map has none waiting for its value.
  bool expects_key() const;

  /// The innermost list or map that is still open, or nullptr.
  const ConfigValue* innermost() const;

  /// The finished tree, or nothing if no value came.
  std::optional<ConfigValue> take_root() { return std::move(root_); }

 private:
  struct OpenValue {
    ConfigValue value;
    std::optional<ConfigValue> key;  ///< of a map, when its value has not come yet
    std::unordered_map<std::string, int> key_lines;
  };

  std::string source_;
  std::vector<OpenValue> open_;
  std::optional<ConfigValue> root_;
};

}  // namespace headwater
