#include "core/config_value.h"

#include <fmt/core.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/config_scalar.h"

namespace headwater {

namespace {

char lower_case(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

bool same_letter(char a, char b) {
  return lower_case(a) == lower_case(b);
}

/// The Damerau-Levenshtein distance in its restricted form: no piece is edited twice.
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> two_above(b.size() + 1), above(b.size() + 1), row(b.size() + 1);
  std::iota(above.begin(), above.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = above[j - 1] + (same_letter(a[i - 1], b[j - 1]) ? 0 : 1);
      row[j] = std::min({above[j] + 1, row[j - 1] + 1, substituted});
      const bool swapped =
          i > 1 && j > 1 && same_letter(a[i - 1], b[j - 2]) && same_letter(a[i - 2], b[j - 1]);
      if (swapped) row[j] = std::min(row[j], two_above[j - 2] + 1);
    }
    std::swap(two_above, above);
    std::swap(above, row);
  }
  return above[b.size()];
}

template <class Container, class Write>
std::string comma_separated(const Container& container, const Write& write) {
  std::string text;
  for (const auto& element : container) text += (text.empty() ? "" : ", ") + write(element);
  return text;
}

std::string scalar_flow_text(const ConfigValue& scalar) {
  // Numbers, true and false mean something without quotes only.
  const bool needs_no_quotes = !scalar.quoted && (parse_real(scalar).value || parse_boolean(scalar).value ||
                                                  infinity_sign(scalar) != 0);
  return needs_no_quotes ? scalar.text : text_scalar(scalar.text);
}

/// Collects the changes between two trees, depth first in the order of `before`, then what only `after` has.
class ChangeList {
 public:
  void compare(const ConfigValue* before, const ConfigValue* after, const std::string& path) {
    if (before && after && before->kind == after->kind && before->kind == ConfigValue::Kind::map) {
      compare_maps(*before, *after, path);
    } else if (before && after && same_shape_lists(*before, *after)) {
      for (size_t i = 0; i < before->items.size(); ++i) {
        compare(&before->items[i], &after->items[i], join_path(path, std::to_string(i)));
      }
    } else if (shown(before) != shown(after)) {
      changes_.push_back(fmt::format("{}: {} -> {}", path, shown(before), shown(after)));
    }
  }

  std::vector<std::string> take() { return std::move(changes_); }

 private:
  /// Lists of the same length are compared piece by piece; others, and lists of scalars, as a whole.
  static bool same_shape_lists(const ConfigValue& before, const ConfigValue& after) {
    const auto is_scalar = [](const ConfigValue& item) { return item.kind == ConfigValue::Kind::scalar; };
    return before.kind == ConfigValue::Kind::sequence && after.kind == before.kind &&
           before.items.size() == after.items.size() &&
           !std::all_of(before.items.begin(), before.items.end(), is_scalar);
  }

  void compare_maps(const ConfigValue& before, const ConfigValue& after, const std::string& path) {
    for (const auto& [key, value] : before.entries) compare(&value, after.find(key), join_path(path, key));
    for (const auto& [key, value] : after.entries) {
      if (!before.find(key)) compare(nullptr, &value, join_path(path, key));
    }
  }

  static std::string shown(const ConfigValue* value) { return value ? flow_text(*value) : "(not given)"; }

  std::vector<std::string> changes_;
};

}  // namespace

const ConfigValue* ConfigValue::find(const std::string& key) const {
  const auto entry = std::find_if(entries.begin(), entries.end(),
                                  [&](const auto& candidate) { return candidate.first == key; });
  return entry == entries.end() ? nullptr : &entry->second;
}

ConfigValue* ConfigValue::find(const std::string& key) {
  return const_cast<ConfigValue*>(std::as_const(*this).find(key));
}

std::string ConfigValue::where() const {
  return line > 0 ? fmt::format("{}:{}", source, line) : source;
}

std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates) {
  const size_t limit = std::max<size_t>(1, name.size() / 3);
  std::string nearest;
  size_t smallest = limit + 1;
  for (const std::string& candidate : candidates) {
    const size_t longer = std::max(name.size(), candidate.size());
    const size_t shorter = std::min(name.size(), candidate.size());
    if (longer - shorter >= smallest) continue;  // each missing letter is an edit
    const size_t distance = edit_distance(name, candidate);
    if (distance < smallest) {
      smallest = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

std::string join_path(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

std::string flow_text(const ConfigValue& value) {
  switch (value.kind) {
    case ConfigValue::Kind::null:
      return "null";
    case ConfigValue::Kind::scalar:
      return scalar_flow_text(value);
    case ConfigValue::Kind::sequence:
      return fmt::format("[{}]", comma_separated(value.items, flow_text));
    case ConfigValue::Kind::map:
      break;
  }
  const auto entry_text = [](const auto& entry) {
    return fmt::format("{}: {}", text_scalar(entry.first), flow_text(entry.second));
  };
  return fmt::format("{{{}}}", comma_separated(value.entries, entry_text));
}

std::vector<std::string> config_changes(const ConfigValue& before, const ConfigValue& after) {
  ChangeList changes;
  changes.compare(&before, &after, "");
  return changes.take();
}

}  // namespace headwater
