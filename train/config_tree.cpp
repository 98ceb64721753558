#include "train/config_tree.h"

#include <utility>

#include "core/config_scalar.h"
#include "core/error.h"

namespace headwater {

ConfigValue ConfigTreeBuilder::make(ConfigValue::Kind kind, int line, int column) const {
  ConfigValue value;
  value.kind = kind;
  value.source = source_;
  value.line = line;
  value.column = column;
  return value;
}

void ConfigTreeBuilder::open(ConfigValue list_or_map) {
  require(open_.size() < max_config_depth, "{}: nested deeper than {} levels", list_or_map.where(),
          max_config_depth);
  open_.push_back({std::move(list_or_map), {}, {}});
}

ConfigValue ConfigTreeBuilder::close() {
  ConfigValue closed = std::move(open_.back().value);
  open_.pop_back();
  return closed;
}

void ConfigTreeBuilder::add(ConfigValue value) {
  if (open_.empty()) {
    root_ = std::move(value);
    return;
  }
  auto& [parent, key, key_lines] = open_.back();
  if (parent.kind == ConfigValue::Kind::sequence) {
    parent.items.push_back(std::move(value));
    return;
  }
  // An entry stands where its key stands.
  value.line = key->line;
  value.column = key->column;
  parent.entries.emplace_back(key->text, std::move(value));
  key.reset();
}

void ConfigTreeBuilder::add_key(const ConfigValue& key) {
  require(!key.text.empty(), "{}: an empty key", key.where());
  const auto [first, is_new] = open_.back().key_lines.emplace(key.text, key.line);
  require(is_new, "{}: the key '{}' is given twice{}", key.where(), excerpt(key.text),
          key.line > 0 ? fmt::format("; the first is on line {}", first->second) : "");
  open_.back().key = key;
}

bool ConfigTreeBuilder::expects_key() const {
  return !open_.empty() && open_.back().value.kind == ConfigValue::Kind::map && !open_.back().key;
}

const ConfigValue* ConfigTreeBuilder::innermost() const {
  return open_.empty() ? nullptr : &open_.back().value;
}

}  // namespace headwater
