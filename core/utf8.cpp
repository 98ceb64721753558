#include "core/utf8.h"

namespace headwater {
namespace {

/// Length of the well-formed character that starts at text[0]; 0 if there is none. Unicode 15, table 3-7.
size_t character_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto continues = [&](size_t i) { return (byte(i) & 0xc0) == 0x80; };
  const unsigned first = byte(0);
  const unsigned second = byte(1);
  if (first < 0x80) return 1;
  if (first < 0xc2) return 0;  // a continuation byte, or the overlong form of an ASCII character
  if (first < 0xe0) return continues(1) ? 2 : 0;
  if (first < 0xf0) {
    const bool is_overlong = first == 0xe0 && second < 0xa0;
    const bool is_surrogate = first == 0xed && second >= 0xa0;
    return continues(1) && continues(2) && !is_overlong && !is_surrogate ? 3 : 0;
  }
  if (first > 0xf4) return 0;
  const bool is_overlong = first == 0xf0 && second < 0x90;
  const bool is_too_large = first == 0xf4 && second >= 0x90;
  return continues(1) && continues(2) && continues(3) && !is_overlong && !is_too_large ? 4 : 0;
}

}  // namespace

size_t valid_utf8_prefix(std::string_view text) {
  size_t position = 0;
  while (position < text.size()) {
    const size_t length = character_length(text.substr(position, 4));
    if (length == 0) break;
    position += length;
  }
  return position;
}

void append_utf8(std::string& text, uint32_t code_point) {
  const auto append = [&](uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  const auto append_continuation = [&](int shift) { append(0x80 | ((code_point >> shift) & 0x3f)); };
  if (code_point < 0x80) return append(code_point);
  if (code_point < 0x800) {
    append(0xc0 | (code_point >> 6));
  } else if (code_point < 0x10000) {
    append(0xe0 | (code_point >> 12));
    append_continuation(6);
  } else {
    append(0xf0 | (code_point >> 18));
    append_continuation(12);
    append_continuation(6);
  }
  append_continuation(0);
}

}  // namespace headwater
