// Each option is declared once, with its default, range and meaning; parsing, `describe`, the resolved config
// and every error text come from that declaration.
//
//   struct ScheduleConfig {
//     std::string type = "cosine";
//     int64_t warmup_steps = 100;
//     void declare(Options& options) {
//       options.text("type", &type, "shape of the learning rate after warm-up").one_of({"constant",
//       "cosine"}); options.integer("warmup_steps", &warmup_steps, "steps of linear warm-up from
//       0").at_least(0);
//     }
//   };
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/config_value.h"

namespace headwater {

class Options;

/// One declared option. The modifiers return *this so that a declaration reads as one line.
class Option {
 public:
  Option& at_least(double minimum);  ///< value >= minimum
  Option& above(double bound);       ///< value > bound
  Option& at_most(double maximum);   ///< value <= maximum
  Option& below(double bound);       ///< value < bound
  Option& one_of(std::vector<std::string> choices);
  /// Another spelling that files may use: the authors' name for the same thing. Giving both is an error.
  Option& alias(std::string name);

  const std::string& name() const;
  const std::vector<std::string>& aliases() const;
  const std::string& meaning() const;
  std::string type_text() const;   ///< "integer", "number", "true or false", "text", "list of 2 numbers", ...
  std::string range_text() const;  ///< ">= 1", "one of constant, cosine", "" if anything goes
  std::string default_text() const;  ///< as YAML would write it
  std::string value_text() const;    ///< the present value as YAML would write it
};

/// The options of one map in a config: a list of declarations bound to the fields of a struct. The fields'
/// values at declaration are the defaults. An Options object must not outlive the struct whose fields it
/// points to.
class Options {
 public:
  Option& integer(std::string name, int64_t* value, std::string meaning);
  Option& real(std::string name, double* value, std::string meaning);
  Option& boolean(std::string name, bool* value, std::string meaning);
  Option& text(std::string name, std::string* value, std::string meaning);
  Option& text_list(std::string name, std::vector<std::string>* value, std::string meaning);
  Option& optional_integer(std::string name, std::optional<int64_t>* value,
                           std::string meaning);  ///< null allowed
  Option& optional_real(std::string name, std::optional<double>* value,
                        std::string meaning);  ///< null allowed
  Option& real_pair(std::string name, std::array<double, 2>* value, std::string meaning);
  /// [lower, upper], either may be null: no limit on that side. `.inf` and `Infinity` count as null.
  Option& limits(std::string name, std::array<std::optional<double>, 2>* value, std::string meaning);

  /// A nested map with options of its own.
  Options& group(std::string name, std::string meaning);

  /// A key whose value needs code of its own (a mixer chosen by its `type`, a list of layers). `read` gets
  /// the value and the dotted path; `write` returns the present value as YAML flow text (used for the
  /// resolved config), or an empty string to leave the key out. `describe` returns the lines that `describe`
  /// prints under it.
  void custom(std::string name, std::string meaning,
              std::function<void(const ConfigValue& value, const std::string& path)> read,
              std::function<std::string()> write, std::function<std::string()> describe = {});

  /// A key that is known but may be used only when something else holds, e.g. an option of another schedule:
  /// giving it anyway is refused with `reason`. Checked after all values are read, when `is_used` can look at
  /// them.
  void used_if(const std::string& name, std::function<bool()> is_used, std::string reason);
};

}  // namespace headwater
