#include "train/override.h"

#include <charconv>
#include <cstdint>
#include <vector>

#include "core/config_scalar.h"
#include "core/error.h"
#include "train/config_tree.h"
#include "train/yaml.h"

namespace headwater {

namespace {

constexpr const char* command_line = "command line";

std::vector<std::string> parts_of(const std::string& path) {
  std::vector<std::string> parts(1);
  for (const char c : path) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

void place_on_command_line(ConfigValue& value) {
  value.source = command_line;
  value.line = value.column = 0;
  for (ConfigValue& item : value.items) place_on_command_line(item);
  for (auto& [key, entry] : value.entries) place_on_command_line(entry);
}

ConfigValue null_on_command_line() {
  ConfigValue null;
  null.source = command_line;
  return null;
}

/// The value under `name` of the map or list `parent`, made if a map lacks it. `path` is the parent's.
ConfigValue& child_of(ConfigValue& parent, const std::string& path, const std::string& name) {
  const std::string full_name = excerpt(join_path(path, name));
  require(!name.empty(), "{}: '{}' has an empty part; write key.key=value", command_line, full_name);
  if (parent.kind == ConfigValue::Kind::null) parent.kind = ConfigValue::Kind::map;
  require(parent.kind != ConfigValue::Kind::scalar, "{}: {} cannot be set, for {} is '{}' ({})", command_line,
          full_name, path, excerpt(parent.text), parent.where());
  if (parent.kind == ConfigValue::Kind::map) {
    if (ConfigValue* value = parent.find(name)) return *value;
    return parent.entries.emplace_back(name, null_on_command_line()).second;
  }
  size_t index = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), index);
  const bool is_index =
      error == std::errc() && end == name.data() + name.size() && index < parent.items.size();
  require(is_index, "{}: {} cannot be set, for {} is a list of {} ({}); expected an index from 0 to {}",
          command_line, full_name, path, parent.items.size(), parent.where(),
          static_cast<int64_t>(parent.items.size()) - 1);
  return parent.items[index];
}

}  // namespace

void apply_override(ConfigValue& root, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  require(equals != std::string::npos, "{}: '{}' has no '='; write key=value", command_line,
          excerpt(assignment));
  const std::vector<std::string> names = parts_of(assignment.substr(0, equals));
  require(names.size() <= max_config_depth, "{}: '{}' is nested deeper than {} levels", command_line,
          excerpt(assignment), max_config_depth);

  const std::string source = fmt::format("{}: '{}'", command_line, excerpt(assignment));
  ConfigValue value = parse_yaml(assignment.substr(equals + 1), source);
  place_on_command_line(value);

  ConfigValue* target = &root;
  std::string path;
  for (const std::string& name : names) {
    target = &child_of(*target, path, name);
    path = join_path(path, name);
  }
  *target = std::move(value);
}

}  // namespace headwater
