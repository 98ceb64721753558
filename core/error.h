// The one error type of the project, and how to throw it with a formatted text.
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace headwater {

/// Whose fault it is. The value is the exit status of the program (DESIGN: "What a user meets").
enum class ErrorKind {
  fell_short = 1,  ///< the program ran and the result is not good enough: a failed verify, a diverged run
  input = 2,       ///< what the user gave is wrong: a config, a file, a shape
  machine = 3,     ///< the machine failed or lacks something: disk full, no memory, no GPU
};

/// Every failure that can reach a user. The text says what was wrong, where, what was expected, what to do.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& text) : std::runtime_error(text), kind_(kind) {}
  ErrorKind kind() const { return kind_; }
  int exit_status() const { return static_cast<int>(kind_); }

 private:
  ErrorKind kind_;
};

/// Throws Error(ErrorKind::input) with a text in fmt's syntax.
template <class... Args>
[[noreturn]] void throw_input_error(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(ErrorKind::input, fmt::format(format, std::forward<Args>(args)...));
}

/// Throws Error(ErrorKind::machine) with a text in fmt's syntax.
template <class... Args>
[[noreturn]] void throw_machine_error(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(ErrorKind::machine, fmt::format(format, std::forward<Args>(args)...));
}

/// Throws an input error with the formatted text unless `condition` holds.
template <class... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) throw Error(ErrorKind::input, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace headwater
