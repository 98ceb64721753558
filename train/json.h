// JSON as a tree of ConfigValue: the recorded options of golden cases, the config.json of checkpoints.
#pragma once

#include <string>

#include "core/config_value.h"

namespace headwater {

/// Reads JSON text. Beyond the standard, Infinity, -Infinity and NaN are scalars, as Python writes them; so
/// is
/// {"__float__": "Infinity"}, as the golden files write it. Numbers keep their text; values have no line
/// numbers. Duplicate and empty keys and nesting deeper than 64 are refused. All errors are input errors.
ConfigValue parse_json(const std::string& text, const std::string& source);

}  // namespace headwater
