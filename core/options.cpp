#include "core/options.h"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <type_traits>

#include "core/config_scalar.h"
#include "core/error.h"

namespace headwater {

namespace {

using Limits = std::array<std::optional<double>, 2>;

template <class... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};
template <class... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;

std::string shown(const ConfigValue& value) {
  switch (value.kind) {
    case ConfigValue::Kind::null:
      return "null";
    case ConfigValue::Kind::scalar:
      return fmt::format("'{}'", excerpt(value.text));
    case ConfigValue::Kind::sequence:
      return fmt::format("a list of {}", value.items.size());
    case ConfigValue::Kind::map:
      break;
  }
  return "a map";
}

std::string did_you_mean(const std::string& name) {
  return name.empty() ? "" : fmt::format(" Did you mean '{}'?", name);
}

std::string value_as_yaml(int64_t value) {
  return std::to_string(value);
}
std::string value_as_yaml(double value) {
  return real_text(value);
}
std::string value_as_yaml(bool value) {
  return value ? "true" : "false";
}
std::string value_as_yaml(const std::string& value) {
  return text_scalar(value);
}

template <class T>
std::string value_as_yaml(const std::optional<T>& value) {
  return value ? value_as_yaml(*value) : "null";
}

template <class List>
std::string list_as_yaml(const List& list) {
  std::string text;
  for (const auto& item : list) text += (text.empty() ? "" : ", ") + value_as_yaml(item);
  return fmt::format("[{}]", text);
}

std::string value_as_yaml(const std::vector<std::string>& value) {
  return list_as_yaml(value);
}
std::string value_as_yaml(const std::array<double, 2>& value) {
  return list_as_yaml(value);
}
std::string value_as_yaml(const Limits& value) {
  return list_as_yaml(value);
}

std::string last_part(const std::string& path) {
  return path.substr(path.rfind('.') + 1);
}

bool is_below(const std::string& path, const std::string& parent) {
  return path.size() > parent.size() && path.compare(0, parent.size(), parent) == 0 &&
         path[parent.size()] == '.';
}

/// "schedule.type" -> "schedule"; "" for a top-level name.
std::string parent_of(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

bool has_name(const OptionDescription& option, const std::string& path) {
  if (option.path == path) return true;
  return std::any_of(option.aliases.begin(), option.aliases.end(), [&](const std::string& alias) {
    return join_path(parent_of(option.path), alias) == path;
  });
}

bool has_last_part(const OptionDescription& option, const std::string& name) {
  return last_part(option.path) == name ||
         std::find(option.aliases.begin(), option.aliases.end(), name) != option.aliases.end();
}

std::string indented(const std::string& lines) {
  std::string text;
  size_t begin = 0;
  while (begin < lines.size()) {
    const size_t end = std::min(lines.find('\n', begin), lines.size());
    text += fmt::format("    {}\n", lines.substr(begin, end - begin));
    begin = end + 1;
  }
  return text;
}

std::string describe_one(const OptionDescription& option) {
  std::string text = option.path + ":";
  if (!option.type.empty()) {
    const std::string range = option.range.empty() ? "" : ", " + option.range;
    text += fmt::format(" {}{}; default {}", option.type, range, option.default_text);
  }
  text += fmt::format("\n{}", indented(option.meaning));
  if (!option.condition.empty()) text += indented(fmt::format("({})", option.condition));
  if (!option.aliases.empty())
    text += indented(fmt::format("also spelled {}", fmt::join(option.aliases, ", ")));
  return text + indented(option.details);
}

}  // namespace

// ---- One option ----

Option::Option(std::string name, Target target, std::string meaning)
    : name_(std::move(name)), meaning_(std::move(meaning)), target_(target), default_text_(value_text()) {}

Option& Option::at_least(double minimum) {
  lower_ = Bound{minimum, false};
  return *this;
}

Option& Option::above(double bound) {
  lower_ = Bound{bound, true};
  return *this;
}

Option& Option::at_most(double maximum) {
  upper_ = Bound{maximum, false};
  return *this;
}

Option& Option::below(double bound) {
  upper_ = Bound{bound, true};
  return *this;
}

Option& Option::one_of(std::vector<std::string> choices) {
  choices_ = std::move(choices);
  return *this;
}

Option& Option::alias(std::string name) {
  aliases_.push_back(std::move(name));
  return *this;
}

std::string Option::type_text() const {
  static constexpr Overloaded type_of = {
      [](const int64_t*) { return "integer"; },
      [](const double*) { return "number"; },
      [](const bool*) { return "true or false"; },
      [](const std::string*) { return "text"; },
      [](const std::vector<std::string>*) { return "list of texts"; },
      [](const std::optional<int64_t>*) { return "integer or null"; },
      [](const std::optional<double>*) { return "number or null"; },
      [](const std::array<double, 2>*) { return "list of 2 numbers"; },
      [](const Limits*) { return "list [lower, upper] of numbers or null"; },
  };
  return std::visit(type_of, target_);
}

std::string Option::range_text() const {
  if (!choices_.empty()) return fmt::format("one of {}", fmt::join(choices_, ", "));
  std::string text;
  if (lower_) text += fmt::format("{} {}", lower_->strict ? ">" : ">=", real_text(lower_->value));
  if (lower_ && upper_) text += " and ";
  if (upper_) text += fmt::format("{} {}", upper_->strict ? "<" : "<=", real_text(upper_->value));
  return text;
}

std::string Option::expected_text() const {
  const std::string range = range_text();
  const std::string with_range = range.empty() ? "" : " " + range;
  const std::string with_each = range.empty() ? "" : ", each " + range;
  const Overloaded expected = {
      [&](const int64_t*) { return "an integer" + with_range; },
      [&](const double*) { return "a number" + with_range; },
      [&](const bool*) { return type_text(); },
      [&](const std::string*) { return item_text(); },
      [&](const std::optional<int64_t>*) { return "an integer" + with_range + " or null"; },
      [&](const std::optional<double>*) { return "a number" + with_range + " or null"; },
      [&](const auto*) { return fmt::format("a {}{}", type_text(), with_each); },
  };
  return std::visit(expected, target_);
}

/// What an item of a list must be.
std::string Option::item_text() const {
  const std::string range = range_text();
  const std::string with_range = range.empty() ? "" : " " + range;
  const Overloaded expected = {
      [&](const std::array<double, 2>*) { return "a number" + with_range; },
      [&](const Limits*) { return "a number" + with_range + " or null"; },
      [&](const auto*) { return range.empty() ? "text" : range; },
  };
  return std::visit(expected, target_);
}

std::string Option::value_text() const {
  return std::visit([](const auto* field) { return value_as_yaml(*field); }, target_);
}

void Option::read(const ConfigValue& value, const std::string& path) {
  const Given given = {value, path, expected_text()};
  std::visit([&](auto* field) { read_into(*field, given); }, target_);
}

void Option::read_into(int64_t& field, const Given& given) const {
  const Parsed<int64_t> parsed = parse_integer(given.value);
  if (!parsed.value || !in_range(static_cast<double>(*parsed.value))) refuse(given, parsed.hint);
  field = *parsed.value;
}

void Option::read_into(double& field, const Given& given) const {
  const Parsed<double> parsed = parse_real(given.value);
  if (!parsed.value || !in_range(*parsed.value)) refuse(given, parsed.hint);
  field = *parsed.value;
}

void Option::read_into(bool& field, const Given& given) const {
  const Parsed<bool> parsed = parse_boolean(given.value);
  if (!parsed.value) refuse(given, parsed.hint);
  field = *parsed.value;
}

void Option::read_into(std::string& field, const Given& given) const {
  if (given.value.kind == ConfigValue::Kind::null) refuse(given, "write \"\" for an empty text");
  if (given.value.kind != ConfigValue::Kind::scalar) refuse(given);
  const std::string& text = given.value.text;
  if (!is_choice(text)) {
    const std::string nearest = nearest_name(text, choices_);
    refuse(given, nearest.empty() ? "" : fmt::format("did you mean '{}'?", nearest));
  }
  field = text;
}

void Option::read_into(std::vector<std::string>& field, const Given& given) const {
  const ConfigValue& list = given.value;
  if (list.kind == ConfigValue::Kind::scalar) refuse(given, fmt::format("write [{}]", excerpt(list.text)));
  if (list.kind != ConfigValue::Kind::sequence) refuse(given);
  std::vector<std::string> texts(list.items.size());
  for (size_t i = 0; i < texts.size(); ++i) read_into(texts[i], item_of(given, i));
  field = std::move(texts);
}

template <class T>
void Option::read_into(std::optional<T>& field, const Given& given) const {
  if (given.value.kind == ConfigValue::Kind::null) {
    field.reset();
    return;
  }
  T number{};
  read_into(number, given);
  field = number;
}

void Option::read_into(std::array<double, 2>& field, const Given& given) const {
  check_is_pair(given);
  std::array<double, 2> pair;
  for (size_t i = 0; i < 2; ++i) read_into(pair[i], item_of(given, i));
  field = pair;
}

void Option::read_into(Limits& field, const Given& given) const {
  check_is_pair(given);
  const Limits limits = {read_limit(item_of(given, 0), -1), read_limit(item_of(given, 1), +1)};
  if (limits[0] && limits[1]) {
    require(*limits[0] <= *limits[1], "{}: {} is [{}, {}]; the lower limit must not be above the upper one",
            given.value.where(), given.path, real_text(*limits[0]), real_text(*limits[1]));
  }
  field = limits;
}

/// `open_sign` is the infinity that means no limit on this side; the other one would forbid every value.
std::optional<double> Option::read_limit(const Given& given, int open_sign) const {
  if (infinity_sign(given.value) == open_sign) return std::nullopt;
  std::optional<double> limit;
  read_into(limit, given);
  return limit;
}

Option::Given Option::item_of(const Given& list, size_t index) const {
  return {list.value.items[index], join_path(list.path, std::to_string(index)), item_text()};
}

bool Option::in_range(double number) const {
  if (lower_ && (lower_->strict ? number <= lower_->value : number < lower_->value)) return false;
  return !upper_ || (upper_->strict ? number < upper_->value : number <= upper_->value);
}

bool Option::is_choice(const std::string& text) const {
  return choices_.empty() || std::find(choices_.begin(), choices_.end(), text) != choices_.end();
}

void Option::check_is_pair(const Given& given) {
  if (given.value.kind != ConfigValue::Kind::sequence || given.value.items.size() != 2) refuse(given);
}

void Option::refuse(const Given& given, const std::string& hint) {
  throw_input_error("{}: {} is {}; expected {}{}", given.value.where(), given.path, shown(given.value),
                    given.expected, hint.empty() ? "" : fmt::format(" ({})", hint));
}

// ---- Declaring ----

Option& Options::integer(std::string name, int64_t* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::real(std::string name, double* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::boolean(std::string name, bool* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::text(std::string name, std::string* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::text_list(std::string name, std::vector<std::string>* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::optional_integer(std::string name, std::optional<int64_t>* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::optional_real(std::string name, std::optional<double>* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::real_pair(std::string name, std::array<double, 2>* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Option& Options::limits(std::string name, Limits* value, std::string meaning) {
  return add_option(std::move(name), value, std::move(meaning));
}

Options& Options::group(std::string name, std::string meaning) {
  Entry& entry = add_entry({std::move(name), std::move(meaning), std::make_unique<Options>()});
  return *std::get<std::unique_ptr<Options>>(entry.content);
}

void Options::custom(std::string name, std::string meaning,
                     std::function<void(const ConfigValue& value, const std::string& path)> read,
                     std::function<std::string()> write, std::function<std::string()> describe) {
  add_entry(
      {std::move(name), std::move(meaning), Custom{std::move(read), std::move(write), std::move(describe)}});
}

void Options::used_if(const std::string& name, std::function<bool()> is_used, std::string reason) {
  const auto entry = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& candidate) { return candidate.name == name; });
  if (entry == entries_.end()) throw std::logic_error("used_if: no option '" + name + "' is declared");
  entry->is_used = std::move(is_used);
  entry->condition = std::move(reason);
}

Option& Options::add_option(std::string name, Option::Target target, std::string meaning) {
  auto option = std::make_unique<Option>(name, target, meaning);
  Entry& entry = add_entry({std::move(name), std::move(meaning), std::move(option)});
  return *std::get<std::unique_ptr<Option>>(entry.content);
}

Options::Entry& Options::add_entry(Entry entry) {
  entries_.push_back(std::move(entry));
  return entries_.back();
}

const std::vector<std::string>& Options::Entry::aliases() const {
  static const std::vector<std::string> none;
  const auto* option = std::get_if<std::unique_ptr<Option>>(&content);
  return option ? (*option)->aliases() : none;
}

std::vector<std::string> Options::names(bool with_aliases) const {
  std::vector<std::string> names;
  for (const Entry& entry : entries_) {
    names.push_back(entry.name);
    if (with_aliases) names.insert(names.end(), entry.aliases().begin(), entry.aliases().end());
  }
  return names;
}

void Options::check_names_differ() const {
  std::set<std::string> seen;
  for (const std::string& name : names(/*with_aliases=*/true)) {
    if (!seen.insert(name).second) throw std::logic_error("the option name '" + name + "' is declared twice");
  }
}

// ---- Reading ----

namespace {

/// The entry of `map` under `name` or one of its aliases, or nullptr. Refuses two spellings of one option.
const std::pair<std::string, ConfigValue>* find_given(const ConfigValue& map, const std::string& path,
                                                      const std::string& name,
                                                      const std::vector<std::string>& aliases) {
  const std::pair<std::string, ConfigValue>* given = nullptr;
  for (const auto& candidate : map.entries) {
    const std::string& key = candidate.first;
    if (key != name && std::find(aliases.begin(), aliases.end(), key) == aliases.end()) continue;
    if (given) {
      throw_input_error("{}: {} is the same option as {} ({}); give only one of them",
                        candidate.second.where(), join_path(path, key), join_path(path, given->first),
                        given->second.where());
    }
    given = &candidate;
  }
  return given;
}

}  // namespace

void Options::read(const ConfigValue& map, const std::string& path) {
  assign(map, path);
  check_used(map, path);
}

void Options::assign(const ConfigValue& map, const std::string& path) {
  check_names_differ();
  if (map.kind == ConfigValue::Kind::null) return;
  require(map.kind == ConfigValue::Kind::map, "{}: {} is {}; expected a map of options: {}", map.where(),
          path.empty() ? "the config" : path, shown(map), fmt::join(names(/*with_aliases=*/false), ", "));

  const std::vector<std::string> known = names(/*with_aliases=*/true);
  for (const NamedValue& given : map.entries) {
    if (std::find(known.begin(), known.end(), given.first) == known.end()) refuse_unknown(given, path);
  }
  for (Entry& entry : entries_) {
    const NamedValue* given = find_given(map, path, entry.name, entry.aliases());
    if (!given) continue;
    const std::string full_name = join_path(path, given->first);
    std::visit(Overloaded{[&](std::unique_ptr<Option>& option) { option->read(given->second, full_name); },
                          [&](std::unique_ptr<Options>& group) { group->assign(given->second, full_name); },
                          [&](Custom& custom) { custom.read(given->second, full_name); }},
               entry.content);
  }
}

void Options::check_used(const ConfigValue& map, const std::string& path) const {
  for (const Entry& entry : entries_) {
    const NamedValue* given = find_given(map, path, entry.name, entry.aliases());
    if (!given) continue;
    const std::string full_name = join_path(path, given->first);
    require(entry.is_used(), "{}: {} has no effect here: {}", given->second.where(), full_name,
            entry.condition);
    const auto* group = std::get_if<std::unique_ptr<Options>>(&entry.content);
    if (group) (*group)->check_used(given->second, full_name);
  }
}

void Options::refuse_unknown(const NamedValue& given, const std::string& path) const {
  const auto& [name, value] = given;
  std::string suggestion = nearest_name(name, names(/*with_aliases=*/true));
  if (suggestion.empty()) {
    // The right name at the wrong place: an option of one of the groups below.
    const std::vector<OptionDescription> below = list(path);
    const auto same_name = std::find_if(below.begin(), below.end(),
                                        [&](const auto& option) { return has_last_part(option, name); });
    if (same_name != below.end()) suggestion = same_name->path;
  }
  throw_input_error("{}: {} is not an option{}.{} Known: {}.", value.where(), excerpt(join_path(path, name)),
                    path.empty() ? "" : " of " + path, did_you_mean(suggestion),
                    fmt::join(names(/*with_aliases=*/false), ", "));
}

// ---- Writing and describing ----

std::string Options::write() const {
  std::string text;
  write_block(text, "");
  return text;
}

void Options::write_block(std::string& out, const std::string& indent) const {
  for (const Entry& entry : entries_) {
    if (!entry.is_used()) continue;
    const auto write_value = [&](const std::string& value) {
      if (!value.empty()) out += fmt::format("{}{}: {}\n", indent, entry.name, value);
    };
    std::visit(Overloaded{[&](const std::unique_ptr<Option>& option) { write_value(option->value_text()); },
                          [&](const std::unique_ptr<Options>& group) {
                            out += fmt::format("{}{}:\n", indent, entry.name);
                            group->write_block(out, indent + "  ");
                          },
                          [&](const Custom& custom) { write_value(custom.write()); }},
               entry.content);
  }
}

std::string Options::write_flow() const {
  std::string text;
  for (const Entry& entry : entries_) {
    if (!entry.is_used()) continue;
    const std::string value =
        std::visit(Overloaded{[](const std::unique_ptr<Option>& option) { return option->value_text(); },
                              [](const std::unique_ptr<Options>& group) { return group->write_flow(); },
                              [](const Custom& custom) { return custom.write(); }},
                   entry.content);
    if (!value.empty()) text += fmt::format("{}{}: {}", text.empty() ? "" : ", ", entry.name, value);
  }
  return fmt::format("{{{}}}", text);
}

std::vector<OptionDescription> Options::list(const std::string& path) const {
  std::vector<OptionDescription> options;
  for (const Entry& entry : entries_) {
    OptionDescription& listed = options.emplace_back();
    listed.path = join_path(path, entry.name);
    listed.meaning = entry.meaning;
    listed.condition = entry.condition;
    listed.aliases = entry.aliases();
    if (const auto* option = std::get_if<std::unique_ptr<Option>>(&entry.content)) {
      listed.type = (*option)->type_text();
      listed.range = (*option)->range_text();
      listed.default_text = (*option)->default_text();
    } else if (const auto* custom = std::get_if<Custom>(&entry.content)) {
      if (custom->describe) listed.details = custom->describe();
    } else {
      const auto below = std::get<std::unique_ptr<Options>>(entry.content)->list(join_path(path, entry.name));
      options.insert(options.end(), below.begin(), below.end());
    }
  }
  return options;
}

std::string Options::describe(const std::string& key) const {
  std::string text;
  std::vector<std::string> paths;
  for (const OptionDescription& option : list()) {
    // A path below a custom key is described by the custom key's own lines.
    const bool wanted = key.empty() || has_name(option, key) || has_last_part(option, key) ||
                        is_below(option.path, key) || (!option.details.empty() && is_below(key, option.path));
    if (wanted) text += describe_one(option);
    paths.push_back(option.path);
  }
  require(!text.empty(), "'{}' is not an option.{}", excerpt(key), did_you_mean(nearest_name(key, paths)));
  return text;
}

}  // namespace headwater
