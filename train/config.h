// The whole config of a run, from a YAML file and the command line.
#pragma once

#include <string>
#include <vector>

#include "models/language_model.h"
#include "train/run_config.h"

namespace headwater {

struct Config {
  RunConfig run;
  LanguageModelConfig model;

  /// Declares every key. The Options must not outlive this config.
  void declare(Options& options);
  /// The resolved config as YAML: every key, defaults included; reads back to the same values.
  std::string write();
};

/// Reads `path` and applies `overrides` ("train.steps=200"). Throws an input error that names file, line and key.
Config load_config(const std::string& path, const std::vector<std::string>& overrides);

/// The keys whose values differ, one line each: "model.d_model: 256 -> 512". Only keys that `matters` accepts.
std::vector<std::string> config_differences(Config& before, Config& after,
                                            bool (*matters)(const std::string& key));

}  // namespace headwater
