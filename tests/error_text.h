// What a user reads when something is refused: tests compare the whole text.
#pragma once

#include <functional>
#include <string>

#include "core/error.h"

namespace headwater {

/// The text of the input error that `action` throws; a note instead if it throws none.
inline std::string input_error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.kind() == ErrorKind::input ? error.what()
                                            : std::string("not an input error: ") + error.what();
  }
  return "(no error)";
}

}  // namespace headwater
