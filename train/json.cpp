#include "train/json.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"
#include "train/config_tree.h"

namespace headwater {

namespace {

/// The receiver of nlohmann's events; the parser itself does not recurse.
class JsonHandler final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonHandler(const std::string& source) : source_(source), builder_(source) {}

  bool null() override { return add(make(ConfigValue::Kind::null)); }
  bool boolean(bool value) override { return add_scalar(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return add_scalar(std::to_string(value)); }
  bool number_unsigned(number_unsigned_t value) override { return add_scalar(std::to_string(value)); }
  bool number_float(number_float_t /*value*/, const string_t& text) override { return add_scalar(text); }
  bool string(string_t& value) override { return add_scalar(value, /*quoted=*/true); }

  bool binary(binary_t& /*value*/) override {
    throw_input_error("{}: binary data, which JSON text cannot hold", source_);
  }

  bool start_object(size_t /*n_elements*/) override { return open(ConfigValue::Kind::map); }
  bool start_array(size_t /*n_elements*/) override { return open(ConfigValue::Kind::sequence); }
  bool end_array() override { return add(builder_.close()); }

  bool end_object() override {
    ConfigValue map = builder_.close();
    if (map.entries.size() == 1 && map.entries[0].first == "__float__") {
      ConfigValue number = std::move(map.entries[0].second);
      number.quoted = false;
      return add(std::move(number));
    }
    return add(std::move(map));
  }

  bool key(string_t& text) override {
    ConfigValue key = make(ConfigValue::Kind::scalar);
    key.text = text;
    builder_.add_key(key);
    return true;
  }

  bool parse_error(size_t /*position*/, const std::string& /*last_token*/,
                   const nlohmann::detail::exception& error) override {
    // "[json.exception.parse_error.101] parse error at ...": the bracket says nothing to a user.
    const std::string text = error.what();
    const size_t bracket = text.find("] ");
    throw_input_error("{}: {}", source_, bracket == std::string::npos ? text : text.substr(bracket + 2));
  }

  ConfigValue take_root() { return *builder_.take_root(); }

 private:
  ConfigValue make(ConfigValue::Kind kind) const { return builder_.make(kind, 0, 0); }

  bool open(ConfigValue::Kind kind) {
    builder_.open(make(kind));
    return true;
  }

  bool add(ConfigValue value) {
    builder_.add(std::move(value));
    return true;
  }

  bool add_scalar(const std::string& text, bool quoted = false) {
    ConfigValue scalar = make(ConfigValue::Kind::scalar);
    scalar.text = text;
    scalar.quoted = quoted;
    return add(std::move(scalar));
  }

  std::string source_;
  ConfigTreeBuilder builder_;
};

/// Which of Python's words for a number that JSON lacks begins `text`; empty if none does.
std::string_view python_number_at(std::string_view text) {
  for (const std::string_view word : {"-Infinity", "Infinity", "NaN"}) {
    if (text.substr(0, word.size()) == word) return word;
  }
  return {};
}

/// `text` with these words put into the form that JSON allows: {"__float__": "Infinity"}.
std::string with_standard_numbers(const std::string& text) {
  std::string standard;
  bool in_string = false;
  for (size_t i = 0; i < text.size();) {
    const std::string_view word =
        in_string ? std::string_view() : python_number_at(std::string_view(text).substr(i));
    if (!word.empty()) {
      standard += fmt::format("{{\"__float__\": \"{}\"}}", word);
      i += word.size();
      continue;
    }
    const bool is_escape = in_string && text[i] == '\\' && i + 1 < text.size();
    if (is_escape) standard += text[i++];
    if (!is_escape && text[i] == '"') in_string = !in_string;
    standard += text[i++];
  }
  return standard;
}

}  // namespace

ConfigValue parse_json(const std::string& text, const std::string& source) {
  JsonHandler handler(source);
  nlohmann::json::sax_parse(with_standard_numbers(text), &handler);
  return handler.take_root();
}

}  // namespace headwater
