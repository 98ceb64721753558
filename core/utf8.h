// UTF-8: checking, and turning code points into bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace headwater {

/// The number of leading bytes that are whole, well-formed UTF-8 characters (no overlong forms, no
/// surrogates, nothing above U+10FFFF); text.size() if all are.
size_t valid_utf8_prefix(std::string_view text);

/// Appends a code point (at most U+10FFFF) as one to four bytes.
void append_utf8(std::string& text, uint32_t code_point);

}  // namespace headwater
