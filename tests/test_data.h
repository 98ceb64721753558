// Where tests find real data.
#pragma once

#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>

#include "core/files.h"

namespace headwater {

/// The path of a data file, in the folder HEADWATER_DATA or in ../shared/data beside the checkout. If it is
/// in neither, says so on standard output and returns nothing; the test then skips what needs it.
inline std::optional<Path> find_test_data(const std::string& name) {
  std::vector<Path> folders = {Path(HEADWATER_SOURCE_DIR) / "../shared/data"};
  if (const char* folder = std::getenv("HEADWATER_DATA")) folders.insert(folders.begin(), folder);
  for (const Path& folder : folders) {
    if (exists(folder / name)) return folder / name;
  }
  std::cout << "SKIPPED: " << name << " is neither in HEADWATER_DATA nor in ../shared/data\n";
  return std::nullopt;
}

}  // namespace headwater
