// Each option is declared once, with its default, range and meaning; parsing, `describe`, the resolved config
// and every error text come from that declaration.
//
//   struct ScheduleConfig {
//     std::string type = "cosine";
//     int64_t warmup_steps = 100;
//     void declare(Options& options) {
//       options.text("type", &type, "shape after the warm-up").one_of({"constant", "cosine"});
//       options.integer("warmup_steps", &warmup_steps, "steps of linear warm-up").at_least(0);
//     }
//   };
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/config_value.h"

namespace headwater {

class Options;

/// One declared option. The modifiers return *this so that a declaration reads as one line.
class Option {
 public:
  /// The field that the option sets; its type is the option's type.
  using Target =
      std::variant<int64_t*, double*, bool*, std::string*, std::vector<std::string>*, std::optional<int64_t>*,
                   std::optional<double>*, std::array<double, 2>*, std::array<std::optional<double>, 2>*>;

  Option(std::string name, Target target, std::string meaning);

  Option& at_least(double minimum);  ///< value >= minimum
  Option& above(double bound);       ///< value > bound
  Option& at_most(double maximum);   ///< value <= maximum
  Option& below(double bound);       ///< value < bound
  Option& one_of(std::vector<std::string> choices);
  /// Another spelling that files may use: the authors' name for the same thing. Giving both is an error.
  Option& alias(std::string name);

  const std::string& name() const { return name_; }
  const std::vector<std::string>& aliases() const { return aliases_; }
  const std::string& meaning() const { return meaning_; }
  std::string type_text() const;   ///< "integer", "number", "true or false", "text", "list of 2 numbers", ...
  std::string range_text() const;  ///< ">= 1", "one of constant, cosine", "" if anything goes
  std::string expected_text() const;  ///< type and range as an error names them: "an integer >= 1 or null"
  std::string default_text() const { return default_text_; }  ///< as YAML would write it
  std::string value_text() const;                             ///< the present value as YAML would write it

  /// Sets the field to `value`, or throws an input error that names `path`, what it is and what was expected.
  void read(const ConfigValue& value, const std::string& path);

 private:
  /// Where a value ends: `strict` if the bound itself lies outside.
  struct Bound {
    double value = 0;
    bool strict = false;
  };

  /// A value together with what a complaint about it says.
  struct Given {
    const ConfigValue& value;
    std::string path;
    std::string expected;
  };

  void read_into(int64_t& field, const Given& given) const;
  void read_into(double& field, const Given& given) const;
  void read_into(bool& field, const Given& given) const;
  void read_into(std::string& field, const Given& given) const;
  void read_into(std::vector<std::string>& field, const Given& given) const;
  void read_into(std::array<double, 2>& field, const Given& given) const;
  void read_into(std::array<std::optional<double>, 2>& field, const Given& given) const;
  template <class T>
  void read_into(std::optional<T>& field, const Given& given) const;

  std::optional<double> read_limit(const Given& given, int open_sign) const;
  Given item_of(const Given& list, size_t index) const;
  std::string item_text() const;
  bool in_range(double number) const;
  bool is_choice(const std::string& text) const;
  static void check_is_pair(const Given& given);
  [[noreturn]] static void refuse(const Given& given, const std::string& hint = "");

  std::string name_;
  std::string meaning_;
  Target target_;
  std::string default_text_;
  std::vector<std::string> aliases_;
  std::vector<std::string> choices_;
  std::optional<Bound> lower_;
  std::optional<Bound> upper_;
};

/// What a walk over declared options finds at one dotted path.
struct OptionDescription {
  std::string path;
  std::string meaning;
  std::string type;                  ///< empty for a group and for a key with code of its own
  std::string range;                 ///< empty if anything goes
  std::string default_text;          ///< as YAML would write it
  std::vector<std::string> aliases;  ///< other spellings of the last part of the path
  std::string condition;             ///< the reason of `used_if`, if any
  std::string details;               ///< the lines of a custom key's own `describe`
};

/// The options of one map in a config: a list of declarations bound to the fields of a struct. The fields'
/// values at declaration are the defaults. An Options object must not outlive the struct whose fields it
/// points to. Declaring a name twice is a mistake in the program, and a std::logic_error.
class Options {
 public:
  Option& integer(std::string name, int64_t* value, std::string meaning);
  Option& real(std::string name, double* value, std::string meaning);
  Option& boolean(std::string name, bool* value, std::string meaning);
  Option& text(std::string name, std::string* value, std::string meaning);
  Option& text_list(std::string name, std::vector<std::string>* value, std::string meaning);
  /// These two may be null.
  Option& optional_integer(std::string name, std::optional<int64_t>* value, std::string meaning);
  Option& optional_real(std::string name, std::optional<double>* value, std::string meaning);
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
  /// them. `name` must be declared before.
  void used_if(const std::string& name, std::function<bool()> is_used, std::string reason);

  /// Assigns every value that `map` gives; `path` is where the map stands in the config, "" for the whole of
  /// it. A null counts as an empty map: a group whose lines are all commented out. Throws an input error for
  /// the first mistake; unknown names come first, then values in the order of declaration, so that a custom
  /// key's `read` can look at the fields declared before it. After an error the fields are partly assigned.
  void read(const ConfigValue& map, const std::string& path);

  /// The present values as YAML block text that reads back to the same bits. Options that are not used
  /// (`used_if`) are left out, since reading would refuse them.
  std::string write() const;

  /// The same on one line, for the `write` of a custom key: "{type: mamba2, d_state: 64}".
  std::string write_flow() const;

  /// Every option in the order of declaration, a group before its contents. `path` is put before each name.
  std::vector<OptionDescription> list(const std::string& path = "") const;

  /// Readable lines about the option at `key` and everything below it; about all options if `key` is empty. A
  /// last part alone ("learning_rate") finds the options of that name in any group. Throws an input error
  /// with the nearest path if there is none.
  std::string describe(const std::string& key = "") const;

 private:
  struct Custom {
    std::function<void(const ConfigValue& value, const std::string& path)> read;
    std::function<std::string()> write;
    std::function<std::string()> describe;
  };

  struct Entry {
    std::string name;
    std::string meaning;
    std::variant<std::unique_ptr<Option>, std::unique_ptr<Options>, Custom> content;
    std::function<bool()> is_used = [] { return true; };
    std::string condition = "";  ///< the reason given to used_if

    const std::vector<std::string>& aliases() const;
  };

  using NamedValue = std::pair<std::string, ConfigValue>;

  Option& add_option(std::string name, Option::Target target, std::string meaning);
  Entry& add_entry(Entry entry);
  void check_names_differ() const;

  void assign(const ConfigValue& map, const std::string& path);
  void check_used(const ConfigValue& map, const std::string& path) const;
  [[noreturn]] void refuse_unknown(const NamedValue& given, const std::string& path) const;
  std::vector<std::string> names(bool with_aliases) const;

  void write_block(std::string& out, const std::string& indent) const;

  std::vector<Entry> entries_;
};

}  // namespace headwater
