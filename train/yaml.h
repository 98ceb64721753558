// Config files as trees of ConfigValue. Everything that YAML readers disagree on, or that a hostile file
// could exploit, is refused: duplicate keys, anchors and aliases, tags, several documents, tabs as
// indentation, control characters, more than 1 MB, nesting deeper than 64. All errors are input errors.
#pragma once

#include <string>

#include "core/config_value.h"

namespace headwater {

/// Reads a whole YAML file: "configs/x.yaml" is the source that errors about its values will name.
ConfigValue read_yaml_file(const std::string& path);

/// Reads YAML text; a byte order mark and CRLF line ends are fine. `source` is what errors call it. Text that
/// holds nothing is a null, which a file must not be.
ConfigValue parse_yaml(const std::string& text, const std::string& source);

}  // namespace headwater
