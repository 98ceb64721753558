#include "train/config.h"

#include <map>

#include "core/error.h"
#include "train/override.h"
#include "train/yaml.h"

namespace headwater {
namespace {

/// Every scalar and list of a config under its dotted key, as text.
void flatten(const ConfigValue& value, const std::string& key, std::map<std::string, std::string>& out) {
  switch (value.kind) {
    case ConfigValue::Kind::null:
      out[key] = "null";
      return;
    case ConfigValue::Kind::scalar:
      out[key] = value.text;
      return;
    case ConfigValue::Kind::sequence:
      for (size_t i = 0; i < value.items.size(); ++i)
        flatten(value.items[i], fmt::format("{}.{}", key, i), out);
      return;
    case ConfigValue::Kind::map:
      for (const auto& [name, entry] : value.entries)
        flatten(entry, key.empty() ? name : key + "." + name, out);
      return;
  }
}

std::map<std::string, std::string> flattened(Config& config) {
  std::map<std::string, std::string> result;
  flatten(parse_yaml(config.write(), "config"), "", result);
  return result;
}

}  // namespace

void Config::declare(Options& options) {
  run.declare(options, [this](Options& group) { model.declare(group); });
}

std::string Config::write() {
  Options options;
  declare(options);
  return options.write();
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
  ConfigValue tree = read_yaml_file(path);
  for (const std::string& assignment : overrides) apply_override(tree, assignment);
  Config config;
  Options options;
  config.declare(options);
  options.read(tree, "");
  config.run.validate();
  config.model.validate("model");
  return config;
}

std::vector<std::string> config_differences(Config& before, Config& after,
                                            bool (*matters)(const std::string& key)) {
  const std::map<std::string, std::string> old_values = flattened(before);
  const std::map<std::string, std::string> new_values = flattened(after);
  std::vector<std::string> lines;
  for (const auto& [key, value] : old_values) {
    if (!matters(key)) continue;
    const auto found = new_values.find(key);
    const std::string now = found == new_values.end() ? "absent" : found->second;
    if (now != value) lines.push_back(fmt::format("{}: {} -> {}", key, value, now));
  }
  for (const auto& [key, value] : new_values) {
    if (matters(key) && old_values.count(key) == 0)
      lines.push_back(fmt::format("{}: absent -> {}", key, value));
  }
  return lines;
}

}  // namespace headwater
