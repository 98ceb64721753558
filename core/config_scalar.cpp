#include "core/config_scalar.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <string_view>

namespace headwater {

namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

bool all_digits(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), is_digit);
}

std::string lower_case(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return lower;
}

std::string_view without_sign(std::string_view text) {
  return !text.empty() && (text[0] == '+' || text[0] == '-') ? text.substr(1) : text;
}

/// std::from_chars knows no plus sign.
std::string_view without_plus(std::string_view text) {
  return text.size() > 1 && text[0] == '+' && text[1] != '-' ? text.substr(1) : text;
}

bool has_leading_zero(std::string_view text) {
  const std::string_view digits = without_sign(text);
  return digits.size() > 1 && digits[0] == '0' && is_digit(digits[1]);
}

/// Reads all of `text`, or says why not: std::errc() if every character was used.
template <class Number>
std::errc read_all(std::string_view text, Number* number) {
  text = without_plus(text);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *number);
  if (error != std::errc()) return error;
  return end == text.data() + text.size() ? std::errc() : std::errc::invalid_argument;
}

/// "1_000" -> "1000" where the underscores stand between digits, else nothing.
std::string without_underscores(const std::string& text) {
  std::string digits;
  std::copy_if(text.begin(), text.end(), std::back_inserter(digits), [](char c) { return c != '_'; });
  double number = 0;
  return digits.size() < text.size() && read_all(digits, &number) == std::errc() ? digits : "";
}

/// What both kinds of number refuse, and how to write it instead; empty if there is nothing to say.
std::string number_hint(const ConfigValue& value) {
  const std::string& text = value.text;
  double number = 0;
  if (value.quoted)
    return read_all(text, &number) == std::errc() ? fmt::format("write {} without quotes", text) : "";
  if (const std::string digits = without_underscores(text); !digits.empty()) return "write " + digits;
  if (has_leading_zero(text)) return "leading zero: octal or decimal?";
  const std::string_view unsigned_text = without_sign(text);
  if (unsigned_text.size() > 2 && unsigned_text[0] == '0' && is_letter(unsigned_text[1])) {
    return "write it in decimal";
  }
  return "";
}

/// 1e3 and 1000.0 are whole numbers in another dress.
std::string whole_number_hint(const std::string& text) {
  constexpr double exact_limit = 9007199254740992.0;  // 2^53: every whole double below is one integer only
  double number = 0;
  if (read_all(text, &number) != std::errc() || std::abs(number) > exact_limit) return "";
  return number == std::trunc(number) ? fmt::format("write {}", static_cast<int64_t>(number)) : "";
}

bool is_not_a_number(const std::string& text) {
  const std::string lower = lower_case(without_sign(text));
  return lower == "nan" || lower == ".nan";
}

bool is_scalar(const ConfigValue& value) {
  return value.kind == ConfigValue::Kind::scalar;
}

/// Words that some YAML reader takes for something else than text.
bool is_reserved_word(const std::string& text) {
  static constexpr std::array<std::string_view, 14> reserved = {
      "null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", ".nan", "inf", ".inf", "infinity"};
  return std::find(reserved.begin(), reserved.end(), lower_case(text)) != reserved.end();
}

/// A conservative choice of texts that mean themselves in every place of a YAML file.
bool is_plain_text(const std::string& text) {
  if (text.empty() || is_reserved_word(text)) return false;
  const bool starts_plainly = is_letter(text[0]) || text[0] == '_' || text[0] == '/';
  return starts_plainly && std::all_of(text.begin(), text.end(), [](char c) {
           return is_letter(c) || is_digit(c) || std::string_view("_/.+-").find(c) != std::string_view::npos;
         });
}

std::string escaped(char c) {
  switch (c) {
    case '"':
      return "\\\"";
    case '\\':
      return "\\\\";
    case '\n':
      return "\\n";
    case '\t':
      return "\\t";
    case '\r':
      return "\\r";
    default:
      break;
  }
  const auto byte = static_cast<unsigned char>(c);
  return byte < 0x20 || byte == 0x7f ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
}

}  // namespace

Parsed<int64_t> parse_integer(const ConfigValue& value) {
  if (!is_scalar(value)) return {};
  if (std::string hint = number_hint(value); value.quoted || !hint.empty()) return {{}, hint};
  int64_t integer = 0;
  const std::errc error = read_all(value.text, &integer);
  if (error == std::errc()) return {integer, ""};
  if (error == std::errc::result_out_of_range && all_digits(without_sign(value.text))) {
    return {{}, "it does not fit in 64 bits"};
  }
  return {{}, whole_number_hint(value.text)};
}

Parsed<double> parse_real(const ConfigValue& value) {
  if (!is_scalar(value)) return {};
  if (std::string hint = number_hint(value); value.quoted || !hint.empty()) return {{}, hint};
  if (infinity_sign(value) != 0 || is_not_a_number(value.text)) return {{}, "only finite numbers"};
  double number = 0;
  const std::errc error = read_all(value.text, &number);
  if (error == std::errc()) return {number, ""};
  if (error == std::errc::result_out_of_range) return {{}, "it is outside the range of a 64-bit number"};
  std::string with_point = value.text;
  std::replace(with_point.begin(), with_point.end(), ',', '.');
  const bool decimal_comma = with_point != value.text && read_all(with_point, &number) == std::errc();
  return {{}, decimal_comma ? fmt::format("write {}", with_point) : ""};
}

Parsed<bool> parse_boolean(const ConfigValue& value) {
  if (!is_scalar(value)) return {};
  if (!value.quoted && value.text == "true") return {true, ""};
  if (!value.quoted && value.text == "false") return {false, ""};
  const std::string word = lower_case(value.text);
  if (word == "true" || word == "yes" || word == "on" || word == "y" || word == "1")
    return {{}, "write true"};
  if (word == "false" || word == "no" || word == "off" || word == "n" || word == "0")
    return {{}, "write false"};
  return {};
}

int infinity_sign(const ConfigValue& value) {
  if (!is_scalar(value) || value.quoted || value.text.empty()) return 0;
  const std::string word = lower_case(without_sign(value.text));
  if (word != ".inf" && word != "inf" && word != "infinity") return 0;
  return value.text[0] == '-' ? -1 : 1;
}

std::string real_text(double number) {
  std::array<char, 32> buffer;
  const auto [end, error] = std::to_chars(buffer.data(), buffer.data() + buffer.size(), number);
  return std::string(buffer.data(), error == std::errc() ? end : buffer.data());
}

std::string text_scalar(const std::string& text) {
  if (is_plain_text(text)) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += escaped(c);
  return quoted + "\"";
}

std::string excerpt(const std::string& text) {
  constexpr size_t longest = 60;
  std::string shown = text.substr(0, longest);
  // Never cut inside a UTF-8 sequence: its later bytes are 10xxxxxx.
  const auto continues = [&](size_t at) { return at < text.size() && (text[at] & 0xC0) == 0x80; };
  while (!shown.empty() && continues(shown.size())) shown.pop_back();
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return shown.size() < text.size() ? shown + "..." : shown;
}

}  // namespace headwater
