#include "core/safetensors_header.h"

#include <algorithm>
#include <optional>

#include "core/error.h"
#include "core/utf8.h"

namespace headwater {
namespace {

struct DTypeRow {
  SafetensorsDType dtype;
  const char* name;
  int bits;
};

constexpr DTypeRow dtype_table[] = {
    {SafetensorsDType::f64, "F64", 64},        {SafetensorsDType::f32, "F32", 32},
    {SafetensorsDType::bf16, "BF16", 16},      {SafetensorsDType::i64, "I64", 64},
    {SafetensorsDType::i32, "I32", 32},        {SafetensorsDType::u8, "U8", 8},
    {SafetensorsDType::f16, "F16", 16},        {SafetensorsDType::i16, "I16", 16},
    {SafetensorsDType::i8, "I8", 8},           {SafetensorsDType::u16, "U16", 16},
    {SafetensorsDType::u32, "U32", 32},        {SafetensorsDType::u64, "U64", 64},
    {SafetensorsDType::boolean, "BOOL", 8},    {SafetensorsDType::c64, "C64", 64},
    {SafetensorsDType::f8_e4m3, "F8_E4M3", 8}, {SafetensorsDType::f8_e5m2, "F8_E5M2", 8},
    {SafetensorsDType::f8_e8m0, "F8_E8M0", 8}, {SafetensorsDType::f6_e2m3, "F6_E2M3", 6},
    {SafetensorsDType::f6_e3m2, "F6_E3M2", 6}, {SafetensorsDType::f4, "F4", 4},
};

const DTypeRow& row_of(SafetensorsDType dtype) {
  return *std::find_if(std::begin(dtype_table), std::end(dtype_table),
                       [&](const DTypeRow& row) { return row.dtype == dtype; });
}

/// Without a tensor's name no entry is shorter than `"":{"dtype":"U8","shape":[],"data_offsets":[0,0]}`.
constexpr size_t shortest_entry_bytes = 48;

/// Reads exactly the grammar of the header and no other JSON, so nothing recurses and nothing is built
/// that is not kept.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const Path& path, SafetensorsHeader& header)
      : text_(text), path_(path), header_(header) {}

  void parse() {
    const size_t n_valid = valid_utf8_prefix(text_);
    if (n_valid < text_.size()) fail_at(n_valid, "is not UTF-8");
    header_.entries.reserve(std::min(text_.size() / shortest_entry_bytes, max_safetensors_tensors));
    parse_object([&](std::string_view name) { parse_member(name); });
    const size_t n_text = text_.find_last_not_of(' ') + 1;
    if (position_ < n_text) fail_at(position_, "has text after the closing brace");
  }

 private:
  [[noreturn]] void fail_at(size_t position, std::string_view reason) const {
    throw_input_error(
        "{}: the safetensors header {} at byte {} of {}; the file is damaged or not a safetensors file",
        path_.string(), reason, position, text_.size());
  }

  [[noreturn]] void fail_tensor(std::string_view reason) const {
    throw_input_error("{}: tensor {} {}", path_.string(), quoted_name(tensor_), reason);
  }

  char peek() const { return position_ < text_.size() ? text_[position_] : '\0'; }

  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++position_;
  }

  bool accept(char wanted) {
    skip_space();
    if (peek() != wanted) return false;
    ++position_;
    return true;
  }

  void expect(char wanted) {
    if (accept(wanted)) return;
    if (position_ == text_.size()) fail_at(position_, "ends too early");
    if (peek() == '{' || peek() == '[') fail_at(position_, "is nested where it must not be");
    fail_at(position_, fmt::format("lacks a '{}'", wanted));
  }

  /// An object; `parse_value(name)` is called with the position at each value.
  template <class ParseValue>
  void parse_object(ParseValue&& parse_value) {
    expect('{');
    if (accept('}')) return;
    do {
      const std::string_view name = parse_string();
      expect(':');
      parse_value(name);
    } while (accept(','));
    expect('}');
  }

  template <class ParseValue>
  void parse_array(ParseValue&& parse_value) {
    expect('[');
    if (accept(']')) return;
    do {
      parse_value();
    } while (accept(','));
    expect(']');
  }

  /// The characters of a string: a part of the text, or of unescaped_strings if it has escapes.
  std::string_view parse_string() {
    expect('"');
    const size_t begin = position_;
    const size_t end = text_.find_first_of("\"\\", begin);
    if (end == std::string_view::npos) fail_at(begin, "has a string without an end");
    if (text_[end] == '\\') return parse_escaped_string();
    position_ = end + 1;
    const std::string_view result = text_.substr(begin, end - begin);
    if (std::any_of(result.begin(), result.end(), is_control))
      fail_at(begin, "has a control character in the string");
    return result;
  }

  static bool is_control(char character) { return static_cast<unsigned char>(character) < 0x20; }

  std::string_view parse_escaped_string() {
    std::string result;
    while (peek() != '"') {
      if (position_ >= text_.size()) fail_at(position_, "has a string without an end");
      if (is_control(peek())) fail_at(position_, "has a control character in the string");
      if (peek() == '\\') {
        ++position_;
        append_escape(result);
      } else {
        result.push_back(text_[position_++]);
      }
    }
    ++position_;
    return header_.unescaped_strings.emplace_back(std::move(result));
  }

  void append_escape(std::string& result) {
    constexpr std::string_view letters = "\"\\/bfnrt";
    constexpr std::string_view characters = "\"\\/\b\f\n\r\t";
    if (peek() == 'u') return append_utf8(result, parse_code_point());
    const size_t which = letters.find(peek());
    if (which == std::string_view::npos) fail_at(position_, "has an unknown escape");
    result.push_back(characters[which]);
    ++position_;
  }

  /// uXXXX, or a pair of them that stands for one code point above U+FFFF.
  uint32_t parse_code_point() {
    const size_t begin = position_;
    const uint32_t first = parse_code_unit();
    if (first < 0xd800 || first > 0xdfff) return first;
    if (first > 0xdbff || peek() != '\\') fail_at(begin, "has half a surrogate pair");
    ++position_;
    const uint32_t second = parse_code_unit();
    if (second < 0xdc00 || second > 0xdfff) fail_at(begin, "has half a surrogate pair");
    return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
  }

  uint32_t parse_code_unit() {
    if (peek() != 'u') fail_at(position_, "has half a surrogate pair");
    ++position_;
    uint32_t unit = 0;
    for (int i = 0; i < 4; ++i, ++position_) {
      const size_t digit = std::string_view("0123456789abcdef").find(static_cast<char>(peek() | 0x20));
      if (peek() < '0' || digit == std::string_view::npos)
        fail_at(position_, "has an escape without four digits");
      unit = unit * 16 + static_cast<uint32_t>(digit);
    }
    return unit;
  }

  /// A whole number in [0, 2^63). Whatever else stands there is named in the error.
  int64_t parse_size(std::string_view what) {
    skip_space();
    const size_t begin = position_;
    constexpr std::string_view number_characters = "+-.0123456789Ee";
    while (number_characters.find(peek()) != std::string_view::npos) ++position_;
    const std::string_view number = text_.substr(begin, position_ - begin);
    if (number.empty() && (peek() == '[' || peek() == '{'))
      fail_tensor(fmt::format("has nesting in its {}", what));
    if (number.empty()) fail_tensor(fmt::format("has no number in its {}", what));
    const auto fail = [&](std::string_view fault) {
      fail_tensor(fmt::format("has {} in its {}, which {}", quoted_name(number), what, fault));
    };
    if (number[0] == '-') fail("is negative");
    if (number.find_first_not_of("0123456789") != std::string_view::npos) fail("is not a whole number");
    if (number.size() > 1 && number[0] == '0') fail("begins with 0");
    int64_t value = 0;
    for (char digit : number) {
      if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, digit - '0', &value)) {
        fail("is 2^63 or more");
      }
    }
    return value;
  }

  void parse_member(std::string_view name) {
    if (name == "__metadata__") return parse_metadata();
    if (header_.entries.size() >= max_safetensors_tensors) {
      fail_at(position_, fmt::format("has more than {} tensors", max_safetensors_tensors));
    }
    tensor_ = name;
    header_.entries.push_back(parse_entry());
  }

  void parse_metadata() {
    if (has_metadata_) fail_at(position_, "has '__metadata__' twice");
    has_metadata_ = true;
    parse_object([&](std::string_view key) {
      skip_space();
      if (peek() != '"') {
        fail_at(position_, fmt::format("has metadata {} that is not a string", quoted_name(key)));
      }
      if (!header_.metadata.emplace(key, parse_string()).second) {
        fail_at(position_, fmt::format("has metadata {} twice", quoted_name(key)));
      }
      if (header_.metadata.size() > max_safetensors_metadata_entries) {
        fail_at(position_,
                fmt::format("has more than {} metadata entries", max_safetensors_metadata_entries));
      }
    });
  }

  SafetensorsEntry parse_entry() {
    SafetensorsEntry entry;
    entry.name = tensor_;
    bool has_dtype = false, has_shape = false, has_offsets = false;
    const auto mark = [&](bool& seen, std::string_view key) {
      if (seen) fail_tensor(fmt::format("has '{}' twice", key));
      seen = true;
    };
    skip_space();
    if (peek() != '{') fail_tensor("is not described by an object");
    parse_object([&](std::string_view key) {
      if (key == "dtype") {
        mark(has_dtype, key);
        entry.dtype = parse_dtype();
      } else if (key == "shape") {
        mark(has_shape, key);
        entry.shape = parse_shape();
      } else if (key == "data_offsets") {
        mark(has_offsets, key);
        parse_offsets(entry);
      } else {
        fail_tensor(
            fmt::format("has the unknown key {}; known: dtype, shape, data_offsets", quoted_name(key)));
      }
    });
    if (!has_dtype) fail_tensor("has no 'dtype'");
    if (!has_shape) fail_tensor("has no 'shape'");
    if (!has_offsets) fail_tensor("has no 'data_offsets'");
    return entry;
  }

  SafetensorsDType parse_dtype() {
    skip_space();
    if (peek() != '"') fail_tensor("has a dtype that is not a string");
    const std::string_view name = parse_string();
    for (const DTypeRow& row : dtype_table) {
      if (name == row.name) return row.dtype;
    }
    fail_tensor(fmt::format("has the unknown dtype {}; it may need a newer Headwater", quoted_name(name)));
  }

  Shape parse_shape() {
    skip_space();
    if (peek() != '[') fail_tensor("has a shape that is not a list");
    std::vector<int64_t> sizes;
    parse_array([&] {
      if (sizes.size() == Shape::max_axes) fail_tensor(fmt::format("has more than {} axes", Shape::max_axes));
      sizes.push_back(parse_size("shape"));
    });
    return Shape(sizes);
  }

  void parse_offsets(SafetensorsEntry& entry) {
    skip_space();
    if (peek() != '[') fail_tensor("has data_offsets that are not a list");
    uint64_t offsets[2] = {};
    int n_offsets = 0;
    parse_array([&] {
      if (n_offsets == 2) fail_tensor("has more than two data_offsets");
      offsets[n_offsets++] = static_cast<uint64_t>(parse_size("data_offsets"));
    });
    if (n_offsets != 2) fail_tensor("has fewer than two data_offsets");
    entry.begin = offsets[0];
    entry.end = offsets[1];
  }

  std::string_view text_;
  const Path& path_;
  SafetensorsHeader& header_;
  std::string_view tensor_;  ///< the one being parsed
  size_t position_ = 0;
  bool has_metadata_ = false;
};

/// Bytes that a tensor must have; nothing if the product overflows or is no whole number of bytes.
std::optional<uint64_t> size_bytes_of(const SafetensorsEntry& entry) {
  uint64_t n_bits = static_cast<uint64_t>(bits_of(entry.dtype));
  for (int64_t size : entry.shape) {
    if (__builtin_mul_overflow(n_bits, static_cast<uint64_t>(size), &n_bits)) return std::nullopt;
  }
  if (n_bits % 8 != 0) return std::nullopt;
  return n_bits / 8;
}

/// What is wrong with one entry by itself; empty if nothing is.
std::string fault_of(const SafetensorsEntry& entry, uint64_t n_data_bytes) {
  if (entry.begin > entry.end) {
    return fmt::format("begins at byte {} of the data, after its end at {}", entry.begin, entry.end);
  }
  if (entry.end > n_data_bytes) {
    return fmt::format("ends at byte {} of the data, but the file holds only {}: it was cut off", entry.end,
                       n_data_bytes);
  }
  const std::optional<uint64_t> wanted = size_bytes_of(entry);
  const uint64_t n_bytes = entry.end - entry.begin;
  if (wanted == n_bytes) return {};
  const std::string kind = fmt::format("of shape {} and dtype {}", entry.shape, name_of(entry.dtype));
  if (!wanted) return fmt::format("{} has no size: it overflows or ends inside a byte", kind);
  return fmt::format("{} must have {} bytes, its data_offsets span {}", kind, *wanted, n_bytes);
}

void check_entries(const std::vector<SafetensorsEntry>& sorted_entries, uint64_t n_data_bytes,
                   const Path& path) {
  const SafetensorsEntry* previous = nullptr;
  for (const SafetensorsEntry& entry : sorted_entries) {
    std::string fault = fault_of(entry, n_data_bytes);
    if (previous && previous->name == entry.name) fault = "is in the header twice";
    if (!fault.empty()) throw_input_error("{}: tensor {} {}", path.string(), quoted_name(entry.name), fault);
    previous = &entry;
  }
}

/// The tensors, one after the other, are the data: no byte is shared, left out or left over.
void check_coverage(const std::vector<SafetensorsEntry>& entries, uint64_t n_data_bytes, const Path& path) {
  std::vector<const SafetensorsEntry*> by_position;
  by_position.reserve(entries.size());
  for (const SafetensorsEntry& entry : entries) by_position.push_back(&entry);
  std::sort(by_position.begin(), by_position.end(), [](const auto* a, const auto* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  uint64_t position = 0;
  for (const SafetensorsEntry* entry : by_position) {
    if (entry->begin < position) {
      throw_input_error(
          "{}: tensor {} overlaps the tensor before it: it begins at byte {} of the data, that ends at {}",
          path.string(), quoted_name(entry->name), entry->begin, position);
    }
    if (entry->begin > position) {
      throw_input_error("{}: bytes {} to {} of the data, before tensor {}, belong to no tensor",
                        path.string(), position, entry->begin, quoted_name(entry->name));
    }
    position = entry->end;
  }
  require(position == n_data_bytes, "{}: {} bytes follow the last tensor, which ends at byte {} of the data",
          path.string(), n_data_bytes - position, position);
}

}  // namespace

const char* name_of(SafetensorsDType dtype) {
  return row_of(dtype).name;
}

int bits_of(SafetensorsDType dtype) {
  return row_of(dtype).bits;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t n_data_bytes, const Path& path) {
  require(!text.empty() && text[0] == '{', "{}: the safetensors header does not begin with '{{'; {}",
          path.string(), "the file is damaged or not a safetensors file");
  SafetensorsHeader header;
  HeaderParser(text, path, header).parse();
  std::sort(header.entries.begin(), header.entries.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  check_entries(header.entries, n_data_bytes, path);
  check_coverage(header.entries, n_data_bytes, path);
  return header;
}

std::string quoted_name(std::string_view name) {
  constexpr size_t longest = 120;
  const bool is_long = name.size() > longest;
  std::string text(name.substr(0, valid_utf8_prefix(name.substr(0, longest))));
  for (char& character : text) {
    if (static_cast<unsigned char>(character) < 0x20 || character == 0x7f) character = '?';
  }
  return fmt::format("'{}{}'", text, is_long ? "..." : "");
}

}  // namespace headwater
