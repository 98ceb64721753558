#include "train/yaml.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string_view>

#include "core/error.h"
#include "train/config_tree.h"

namespace headwater {

namespace {

constexpr size_t max_file_bytes = 1 << 20;

/// Turns yaml-cpp's events into a tree. (Its own tree would hide duplicate keys.)
class YamlHandler final : public YAML::EventHandler {
 public:
  YamlHandler(const std::string& text, const std::string& source) : text_(text), builder_(source) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (n_documents_++ > 0) {
      refuse(mark,
             "text after the end of the document: a second document, or a line that is not 'key: value'");
    }
  }

  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    check_anchor(mark, anchor);
    if (builder_.expects_key()) refuse(mark, "an empty key");
    builder_.add(make(ConfigValue::Kind::null, mark));
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t /*anchor*/) override {
    refuse(mark, "aliases (*name) are not supported; write the value out");
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& text) override {
    check_anchor(mark, anchor);
    check_tag(mark, tag);
    check_quote_is_closed(mark);
    ConfigValue scalar = make(ConfigValue::Kind::scalar, mark);
    scalar.text = text;
    scalar.quoted = tag == "!";
    if (builder_.expects_key()) {
      builder_.add_key(scalar);
    } else {
      builder_.add(std::move(scalar));
    }
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value style) override {
    open(ConfigValue::Kind::sequence, mark, tag, anchor, style);
  }

  void OnSequenceEnd() override { close(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value style) override {
    open(ConfigValue::Kind::map, mark, tag, anchor, style);
  }

  void OnMapEnd() override { close(); }

  /// The tree; null if the text held nothing but white space and comments.
  ConfigValue take_root() {
    return builder_.take_root().value_or(builder_.make(ConfigValue::Kind::null, 0, 0));
  }

  /// Says in this project's words what yaml-cpp complains about.
  [[noreturn]] void explain(const YAML::Exception& error) const {
    const ConfigValue* open = builder_.innermost();
    if (open && in_brackets_.back() && error.msg.find("flow not found") != std::string::npos) {
      const char bracket = open->kind == ConfigValue::Kind::sequence ? '[' : '{';
      throw_input_error("{}:{}: this '{}' is not closed", open->where(), open->column, bracket);
    }
    refuse(error.mark, error.msg);
  }

 private:
  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& reason) const {
    const ConfigValue position = make(ConfigValue::Kind::null, mark);
    throw_input_error("{}:{}: {}", position.where(), position.column, reason);
  }

  /// yaml-cpp counts lines and columns from 0.
  ConfigValue make(ConfigValue::Kind kind, const YAML::Mark& mark) const {
    return builder_.make(kind, mark.line + 1, mark.column + 1);
  }

  void open(ConfigValue::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            YAML::EmitterStyle::value style) {
    check_anchor(mark, anchor);
    check_tag(mark, tag);
    // yaml-cpp also takes an unclosed bracket at the start of a line for a key.
    if (builder_.expects_key()) refuse(mark, "a key must be text, not a list; is a bracket not closed?");
    builder_.open(make(kind, mark));
    in_brackets_.push_back(style == YAML::EmitterStyle::Flow);
  }

  void close() {
    in_brackets_.pop_back();
    builder_.add(builder_.close());
  }

  void check_anchor(const YAML::Mark& mark, YAML::anchor_t anchor) const {
    if (anchor != YAML::NullAnchor) refuse(mark, "anchors (&name) are not supported; write the value out");
  }

  /// yaml-cpp gives "?" to what has no tag, and "!" to scalars in quotes.
  void check_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (tag != "?" && tag != "!" && !tag.empty()) refuse(mark, "tags (!name) are not supported; remove it");
  }

  /// yaml-cpp takes the end of the file for a missing quote if a line end comes before it.
  void check_quote_is_closed(const YAML::Mark& mark) const {
    const size_t begin = static_cast<size_t>(mark.pos);
    if (begin >= text_.size() || (text_[begin] != '"' && text_[begin] != '\'')) return;
    const char quote = text_[begin];
    for (size_t i = begin + 1; i < text_.size(); ++i) {
      const bool doubled = quote == '\'' && i + 1 < text_.size() && text_[i + 1] == quote;
      if ((quote == '"' && text_[i] == '\\') || (text_[i] == quote && doubled)) {
        ++i;
      } else if (text_[i] == quote) {
        return;
      }
    }
    refuse(mark, "this quote is not closed");
  }

  const std::string& text_;
  ConfigTreeBuilder builder_;
  std::vector<bool> in_brackets_;  ///< for each open list or map: written with brackets, not by indentation
  int n_documents_ = 0;
};

/// How many bytes the UTF-8 sequence at the start of `text` has; 0 if it is not a valid one.
size_t utf8_sequence_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto continues = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
  if (byte(0) < 0x80) return 1;
  if (byte(0) >= 0xC2 && byte(0) <= 0xDF) return continues(1) ? 2 : 0;
  if (byte(0) >= 0xE0 && byte(0) <= 0xEF) {
    const bool overlong = byte(0) == 0xE0 && byte(1) < 0xA0;
    const bool surrogate = byte(0) == 0xED && byte(1) >= 0xA0;
    return continues(1) && continues(2) && !overlong && !surrogate ? 3 : 0;
  }
  if (byte(0) >= 0xF0 && byte(0) <= 0xF4) {
    const bool overlong = byte(0) == 0xF0 && byte(1) < 0x90;
    const bool too_large = byte(0) == 0xF4 && byte(1) >= 0x90;
    return continues(1) && continues(2) && continues(3) && !overlong && !too_large ? 4 : 0;
  }
  return 0;
}

/// Refuses what is not UTF-8 text: yaml-cpp would replace it, or take a zero byte for the end.
void check_characters(const std::string& text, const std::string& source) {
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_sequence_length(std::string_view(text).substr(i));
    require(length > 0, "{}:{}: not UTF-8 text", source, line);
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool is_control = byte < 0x20 && byte != '\n' && byte != '\r' && byte != '\t';
    require(!is_control, "{}:{}: the control character 0x{:02x}; is this a text file?", source, line, byte);
    if (byte == '\n') ++line;
    i += length;
  }
}

/// yaml-cpp refuses some tabs in the indentation with an unclear text and reads over others.
void check_indentation(const std::string& text, const std::string& source) {
  int line = 0;
  for (size_t begin = 0; begin < text.size();) {
    ++line;
    const size_t end = std::min(text.find('\n', begin), text.size());
    const size_t tab = std::min(text.find_first_not_of(' ', begin), end);
    require(tab == end || text[tab] != '\t', "{}:{}:{}: a tab in the indentation; YAML wants spaces", source,
            line, tab - begin + 1);
    begin = end + 1;
  }
}

std::string without_byte_order_mark(const std::string& text) {
  return text.rfind("\xEF\xBB\xBF", 0) == 0 ? text.substr(3) : text;
}

}  // namespace

ConfigValue read_yaml_file(const std::string& path) {
  std::error_code no_error;
  require(!std::filesystem::is_directory(path, no_error), "{}: this is a folder; expected a YAML file", path);
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  require(file.is_open(), "{}: cannot be opened: {}", path, std::strerror(errno));
  std::string text(max_file_bytes + 1, '\0');  // one more than allowed: pipes have no size to ask for
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  require(!file.bad(), "{}: cannot be read: {}", path, std::strerror(errno));
  text.resize(static_cast<size_t>(file.gcount()));
  ConfigValue config = parse_yaml(text, path);
  require(config.kind != ConfigValue::Kind::null, "{}: the file is empty; expected lines of 'key: value'",
          path);
  return config;
}

ConfigValue parse_yaml(const std::string& marked_text, const std::string& source) {
  require(marked_text.size() <= max_file_bytes, "{}: larger than 1 MB; this is not a config", source);
  const std::string text = without_byte_order_mark(marked_text);
  check_characters(text, source);
  check_indentation(text, source);

  std::istringstream stream(text);
  YamlHandler handler(text, source);
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(handler)) {
    }
  } catch (const YAML::Exception& error) {
    handler.explain(error);
  }
  return handler.take_root();
}

}  // namespace headwater
