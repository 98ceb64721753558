// Command-line overrides of a config.
#pragma once

#include <string>

#include "core/config_value.h"

namespace headwater {

/// Applies "train.steps=200" or "model.layers.0.repeat=2": a dotted path of keys and list indices, and a
/// value in YAML ("[1, 2]", "null", "{type: mamba2}"). Maps on the way are made where they are missing. The
/// value's source is "command line". All errors are input errors.
void apply_override(ConfigValue& root, const std::string& assignment);

}  // namespace headwater
