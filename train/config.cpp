#include "train/config.h"

#include "core/error.h"
#include "train/override.h"
#include "train/yaml.h"

namespace headwater {

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
  std::vector<std::string> lines =
      config_changes(parse_yaml(before.write(), "before"), parse_yaml(after.write(), "after"));
  std::erase_if(lines,
                [matters](const std::string& line) { return !matters(line.substr(0, line.find(':'))); });
  return lines;
}

}  // namespace headwater
