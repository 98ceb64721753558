#include "core/utf8.h"

#include "tests/catch.h"

namespace headwater {
namespace {

TEST_CASE("utf8: well-formed text passes, the first bad byte is found") {
  const auto prefix_of = [](std::string_view text) { return valid_utf8_prefix(text); };
  CHECK(prefix_of("") == 0);
  CHECK(prefix_of("a\xc3\xa9\xe6\xb0\xb4\xf0\x9f\x8c\x8a") == 10);
  CHECK(prefix_of("ab\x80") == 2);              // a continuation alone
  CHECK(prefix_of("ab\xc3") == 2);              // cut off
  CHECK(prefix_of("ab\xc0\xaf") == 2);          // overlong, 2 bytes
  CHECK(prefix_of("ab\xe0\x80\xaf") == 2);      // overlong, 3 bytes
  CHECK(prefix_of("ab\xf0\x80\x80\xaf") == 2);  // overlong, 4 bytes
  CHECK(prefix_of("ab\xed\xa0\x80") == 2);      // a surrogate
  CHECK(prefix_of("ab\xf4\x90\x80\x80") == 2);  // above U+10FFFF
  CHECK(prefix_of("ab\xff") == 2);
}

TEST_CASE("utf8: every code point is written as it is read") {
  for (uint32_t code_point = 0; code_point <= 0x10ffff; code_point += code_point < 0x800 ? 1 : 61) {
    std::string text;
    append_utf8(text, code_point);
    const bool is_surrogate = code_point >= 0xd800 && code_point <= 0xdfff;
    const size_t expected_length = code_point < 0x80      ? 1
                                   : code_point < 0x800   ? 2
                                   : code_point < 0x10000 ? 3
                                                          : 4;
    if (text.size() != expected_length || (valid_utf8_prefix(text) == text.size()) == is_surrogate) {
      FAIL("code point " << code_point);
    }
  }
}

}  // namespace
}  // namespace headwater
