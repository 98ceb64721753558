// The documents against the source tree: the tour in README.md names real files and functions, its config and
// those in configs/ load, links lead somewhere.

#include <cctype>
#include <fstream>

#include "core/files.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"
#include "train/config.h"

using namespace headwater;

namespace {

const Path source_folder = HEADWATER_SOURCE_DIR;

std::string text_of(const Path& path) {
  return read_text_file(path, 1 << 24);
}

/// What stands between `begin` and the next `end` after it; REQUIREs both.
std::string between(const std::string& text, const std::string& begin, const std::string& end) {
  const size_t first = text.find(begin);
  REQUIRE(first != std::string::npos);
  const size_t start = first + begin.size();
  const size_t last = text.find(end, start);
  REQUIRE(last != std::string::npos);
  return text.substr(start, last - start);
}

/// Every piece of `text` between `open` and the next `close`, in order.
std::vector<std::string> all_between(const std::string& text, const std::string& open,
                                     const std::string& close) {
  std::vector<std::string> pieces;
  for (size_t at = text.find(open); at != std::string::npos; at = text.find(open, at)) {
    at += open.size();
    const size_t end = text.find(close, at);
    if (end == std::string::npos) break;
    pieces.push_back(text.substr(at, end - at));
    at = end + close.size();
  }
  return pieces;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// Whether `word` stands in `text` without a letter, digit or _ before it. What follows is part of `word`.
bool has_word(const std::string& text, const std::string& word) {
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
    const bool is_inside =
        at > 0 && (std::isalnum(static_cast<unsigned char>(text[at - 1])) != 0 || text[at - 1] == '_');
    if (!is_inside) return true;
  }
  return false;
}

/// Whether `source` has the function `name`: "f", or "Class::f", written so or inside the class.
bool has_function(const std::string& source, const std::string& name) {
  if (has_word(source, name + "(")) return true;
  const size_t colons = name.rfind("::");
  if (colons == std::string::npos) return false;
  const std::string owner = name.substr(0, colons);
  return (has_word(source, "class " + owner + " ") || has_word(source, "struct " + owner + " ")) &&
         has_word(source, name.substr(colons + 2) + "(");
}

std::vector<Path> yaml_files(const std::string& folder) {
  std::vector<Path> paths;
  for (const std::string& name : list_directory(source_folder / folder)) {
    if (ends_with(name, ".yaml")) paths.push_back(source_folder / folder / name);
  }
  return paths;
}

void check_loads(const Path& path) {
  INFO(path.string());
  CHECK_NOTHROW(load_config(path.string(), {}));
}

}  // namespace

TEST_CASE("README: every file and function of the tour is in the source tree") {
  const std::string tour = between(text_of(source_folder / "README.md"), "## One training step", "\n## ");
  std::string path, source;
  int n_functions = 0;
  // In the order of the text: `folder/file.cpp`, then `function()` or `Class::function()` in that file.
  for (const std::string& quoted : all_between(tour, "`", "`")) {
    INFO("`" << quoted << "` after `" << path << "`");
    if (quoted.find("/") != std::string::npos &&
        (ends_with(quoted, ".cpp") || ends_with(quoted, ".h") || ends_with(quoted, ".cu"))) {
      path = quoted;
      REQUIRE(path_exists(source_folder / path));
      source = text_of(source_folder / path);
    } else if (ends_with(quoted, "()")) {
      CHECK(has_function(source, quoted.substr(0, quoted.size() - 2)));
      ++n_functions;
    }
  }
  // A tour in another form would be checked by nothing.
  CHECK(n_functions >= 20);
}

TEST_CASE("README: a name that is not there is noticed") {
  CHECK(has_function("StepReport Trainer::step() {", "Trainer::step"));
  CHECK(has_function("class ForwardHead {\n  void run_chunk(int chunk) {", "ForwardHead::run_chunk"));
  CHECK_FALSE(has_function("void BackwardHead::run(int) {", "ForwardHead::run"));
  CHECK_FALSE(has_function("void rerun(int) {", "run"));
  CHECK_FALSE(has_function("class Trainer {};", "Trainer::step"));
}

TEST_CASE("README: its config loads") {
  const TemporaryFolder folder;
  const Path path = folder.path() / "readme.yaml";
  std::ofstream(path) << between(text_of(source_folder / "README.md"), "```yaml\n", "```");
  check_loads(path);
}

TEST_CASE("configs: every one loads and says on its first line what it is") {
  const std::vector<Path> configs = yaml_files("configs");
  CHECK(configs.size() >= 3);
  for (const Path& path : configs) {
    check_loads(path);
    CHECK(text_of(path).substr(0, 2) == "# ");
  }
  for (const Path& path : yaml_files("bench/peers")) check_loads(path);
}

TEST_CASE("documents: every link to a file leads to one") {
  for (const std::string document :
       {"README.md", "CONTRIBUTING.md", "docs/cuda.md", "docs/design.md", "docs/device_results.md",
        "docs/families.md", "docs/formats.md", "docs/performance.md"}) {
    const Path path = source_folder / document;
    for (std::string target : all_between(text_of(path), "](", ")")) {
      if (target.find("://") != std::string::npos || target[0] == '#') continue;
      target = target.substr(0, target.find('#'));
      INFO(document << ": " << target);
      CHECK(path_exists(path.parent_path() / target));
    }
  }
}
