// The scalars of a config: reading that takes nothing for granted, and writing that reads back the same.
// Independent of the locale: the decimal sign is a point everywhere.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/config_value.h"

namespace headwater {

/// A value, or nothing and perhaps a hint at what the writer may have meant ("write 1000").
template <class T>
struct Parsed {
  std::optional<T> value;
  std::string hint;
};

/// Decimal digits with an optional sign, within 64 bits. What YAML readers disagree on is refused with a
/// hint: 1e3, 010 (8 to some, 10 to others), 0x10, 1_000, "5" in quotes.
Parsed<int64_t> parse_integer(const ConfigValue& value);

/// A finite decimal number, with the same refusals as parse_integer for 010, 1_000 and quotes.
Parsed<double> parse_real(const ConfigValue& value);

/// true or false, and none of YAML 1.1's other spellings.
Parsed<bool> parse_boolean(const ConfigValue& value);

/// +1 for "Infinity", ".inf" and their kin, -1 for the negative ones, 0 for everything else.
int infinity_sign(const ConfigValue& value);

/// The shortest decimal text that reads back as the same double.
std::string real_text(double number);

/// `text` as a YAML scalar that every reader takes for this very text: in quotes unless it needs none.
std::string text_scalar(const std::string& text);

/// `text` for an error message: one line, cut off where it is long.
std::string excerpt(const std::string& text);

}  // namespace headwater
