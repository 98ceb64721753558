#include "train/yaml.h"

#include <chrono>
#include <filesystem>
#include <fstream>

#include "tests/catch.h"
#include "tests/error_text.h"

using namespace headwater;

namespace {

std::string yaml_error(const std::string& text) {
  return input_error_of([&] { parse_yaml(text, "x.yaml"); });
}

std::string repeated(const std::string& text, int n_times) {
  std::string result;
  for (int i = 0; i < n_times; ++i) result += text;
  return result;
}

/// A folder of this test's own, removed when it ends.
class TemporaryFolder {
 public:
  TemporaryFolder() : path_(std::filesystem::temp_directory_path() / "headwater_yaml_test_\xC3\xA9") {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }

  std::string path() const { return path_.string(); }

  std::string write(const std::string& name, const std::string& text) const {
    const std::string file = path_ / name;
    std::ofstream(file, std::ios::binary) << text;
    return file;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace

TEST_CASE("yaml: the tree and where its pieces stand") {
  const ConfigValue root = parse_yaml(
      "# a comment\nmodel:\n  d_model: 64\n  name: '12'\nlayers:\n  - {type: s5}\n  - ~\ntext: |\n  two\n  "
      "lines\n",
      "x.yaml");
  REQUIRE(root.kind == ConfigValue::Kind::map);
  const ConfigValue* model = root.find("model");
  REQUIRE(model);
  CHECK(model->where() == "x.yaml:2");
  CHECK(model->find("d_model")->text == "64");
  CHECK(model->find("d_model")->where() == "x.yaml:3");
  CHECK(model->find("d_model")->column == 3);
  CHECK_FALSE(model->find("d_model")->quoted);
  CHECK(model->find("name")->quoted);
  CHECK(model->find("missing") == nullptr);
  CHECK(root.find("layers")->items[0].where() == "x.yaml:6");
  CHECK(root.find("layers")->items[1].kind == ConfigValue::Kind::null);
  CHECK(root.find("text")->text == "two\nlines\n");
}

TEST_CASE("yaml: a byte order mark, CRLF and trailing tabs are fine") {
  CHECK(flow_text(parse_yaml("\xEF\xBB\xBF"
                             "a: 1\r\nb:\r\n  c: 2\t\r\n\r\n# a comment\r\n",
                             "x.yaml")) == "{a: 1, b: {c: 2}}");
  CHECK(parse_yaml("a: 1\r\nb: 2\r\n", "x.yaml").find("b")->line == 2);
}

TEST_CASE("yaml: duplicate keys are refused with both lines") {
  CHECK(yaml_error("a: 1\nb: 2\na: 3\n") == "x.yaml:3: the key 'a' is given twice; the first is on line 1");
  CHECK(yaml_error("m:\n  a: 1\n  'a': 3\n") ==
        "x.yaml:3: the key 'a' is given twice; the first is on line 2");
  CHECK(yaml_error("m: {a: 1}\nn: {a: 1}\n") == "(no error)");
}

TEST_CASE("yaml: keys must be text") {
  CHECK(yaml_error("[1]: 2") == "x.yaml:1:1: a key must be text, not a list; is a bracket not closed?");
  CHECK(yaml_error("{}: 2") == "x.yaml:1:1: a key must be text, not a list; is a bracket not closed?");
  CHECK(yaml_error("a: 1\n~: 2\n") == "x.yaml:2:1: an empty key");
  CHECK(yaml_error("'': 2") == "x.yaml:1: an empty key");
  CHECK(yaml_error(": 2") == "x.yaml:1:1: an empty key");
}

TEST_CASE("yaml: anchors, aliases, tags and several documents are refused") {
  const std::string anchors = "anchors (&name) are not supported; write the value out";
  CHECK(yaml_error("a: &x 1\nb: *x\n") == "x.yaml:1:4: " + anchors);
  CHECK(yaml_error("a: &x [1]\n") == "x.yaml:1:4: " + anchors);
  CHECK(yaml_error("a: &x\n") == "x.yaml:1:4: " + anchors);
  CHECK(yaml_error("a: *x") == "x.yaml:1:4: the referenced anchor is not defined");
  const std::string bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n";
  CHECK(yaml_error(bomb) == "x.yaml:1:4: " + anchors);
  CHECK(yaml_error("a: !!int 1") == "x.yaml:1:4: tags (!name) are not supported; remove it");
  CHECK(yaml_error("a: !x [1]") == "x.yaml:1:4: tags (!name) are not supported; remove it");
  CHECK_THAT(yaml_error("a: 1\n---\nb: 2\n"),
             ContainsSubstring("x.yaml:2:1: text after the end of the document: a second document"));
  CHECK_THAT(yaml_error("[1, 2] x"), ContainsSubstring("x.yaml:1:8: text after the end"));
}

TEST_CASE("yaml: malformed text is refused with line and column") {
  CHECK(yaml_error("a: [1, 2\nb: 3\n") == "x.yaml:1:4: this '[' is not closed");
  CHECK(yaml_error("a: {x: 1\nb: 3\n") == "x.yaml:1:4: this '{' is not closed");
  CHECK(yaml_error("m:\n  a: 1\nb: [") == "x.yaml:3:4: this '[' is not closed");
  CHECK(yaml_error("a: 1\n]\n") == "x.yaml:2:1: illegal flow end");
  CHECK(yaml_error("a: b: c") == "x.yaml:1:5: illegal map value");
  CHECK(yaml_error("caf\xC3\xA9: 'x'\na: \"open\n") == "x.yaml:2:4: this quote is not closed");
  CHECK(yaml_error("a: 'it''s\n") == "x.yaml:1:4: this quote is not closed");
  CHECK(yaml_error("a: \"open\\\"\n") == "x.yaml:1:4: this quote is not closed");
  CHECK(yaml_error("\xC3\xA9: \"\xC3\xA9\\\"\"\nb: 'it''s'\n") == "(no error)");
  CHECK_THAT(yaml_error("a: \"open"), ContainsSubstring("x.yaml:1"));
  CHECK_THAT(yaml_error("a: @x"), ContainsSubstring("x.yaml:1:4: unknown token"));
}

TEST_CASE("yaml: tabs in the indentation are refused") {
  CHECK(yaml_error("a:\n\tb: 1\n") == "x.yaml:2:1: a tab in the indentation; YAML wants spaces");
  CHECK(yaml_error("a:\n  \tb: 1\n") == "x.yaml:2:3: a tab in the indentation; YAML wants spaces");
  CHECK(yaml_error("a: 1\n \t\nb: 2") == "x.yaml:2:2: a tab in the indentation; YAML wants spaces");
  CHECK(yaml_error("a:\tb\n") == "(no error)");
}

TEST_CASE("yaml: what is not text is refused") {
  CHECK(yaml_error("a: 1\nb: \xFF\n") == "x.yaml:2: not UTF-8 text");
  for (const std::string bytes : {"\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
                                  "\xF4\x90\x80\x80", "\xC3", "\x80", "\xE6\xB0", "\xF5\x80\x80\x80"}) {
    CHECK(yaml_error("a: " + bytes) == "x.yaml:1: not UTF-8 text");
  }
  CHECK(yaml_error("\xE6\xB0\xB4: \xF0\x9F\x8C\x8A") == "(no error)");
  CHECK(yaml_error(std::string("a: 1\n\0b: 2\n", 11)) ==
        "x.yaml:2: the control character 0x00; is this a text file?");
  CHECK(yaml_error(std::string("\xFF\xFE"
                               "a\0",
                               4)) == "x.yaml:1: not UTF-8 text");
}

TEST_CASE("yaml: text that holds nothing is null") {
  for (const std::string text : {"", "\n\n", "# nothing\n", "---\n", "\xEF\xBB\xBF", "null"}) {
    CHECK(parse_yaml(text, "x.yaml").kind == ConfigValue::Kind::null);
  }
}

TEST_CASE("yaml: deep and large inputs are refused quickly") {
  const auto start = std::chrono::steady_clock::now();
  const std::string deep = "nested deeper than 64 levels";
  CHECK_THAT(yaml_error(repeated("- ", 100000)), ContainsSubstring(deep));
  for (const std::string opening : {"[", "{", "? ", "{a: ", "[{"}) {
    CHECK_THAT(yaml_error("a: [" + repeated(opening, 100000)), ContainsSubstring("x.yaml:1:"));
    CHECK_THAT(yaml_error(repeated(opening, 100000)), ContainsSubstring("x.yaml:1:"));
  }
  std::string indented;
  for (int depth = 0; depth < 1000; ++depth) indented += std::string(depth, ' ') + "a:\n";
  CHECK_THAT(yaml_error(indented), ContainsSubstring("x.yaml:65: " + deep));
  CHECK(yaml_error(repeated("[", 64) + repeated("]", 64)) == "(no error)");
  CHECK_THAT(yaml_error(repeated("[", 65) + repeated("]", 65)), ContainsSubstring(deep));
  CHECK(yaml_error(repeated("a", 1 << 20) + "b") == "x.yaml: larger than 1 MB; this is not a config");
  for (const std::string piece :
       {"'",     "\"a\" ", "a: ", "&a ", "*a ",   "!a ", "a,", "a\n", "- a\n", "% ",      "%a\n",
        "---\n", "\t",     "]",   ": ",  "? a\n", "|\n", ">",  "\\",  "# ",    "a: 'b'\n"}) {
    yaml_error(repeated(piece, (1 << 20) / static_cast<int>(piece.size())));
  }
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60));
}

TEST_CASE("yaml: files") {
  const TemporaryFolder folder;
  const std::string good = folder.write("good.yaml", "a: 1\n");
  CHECK(read_yaml_file(good).find("a")->where() == good + ":1");
  const auto error_of = [](const std::string& path) { return input_error_of([&] { read_yaml_file(path); }); };
  CHECK(error_of(folder.path()) == folder.path() + ": this is a folder; expected a YAML file");
  CHECK(error_of(folder.path() + "/none.yaml") ==
        folder.path() + "/none.yaml: cannot be opened: No such file or directory");
  for (const std::string text : {"", "\n\n", "# nothing\n", "---\n", "null"}) {
    const std::string empty = folder.write("empty.yaml", text);
    CHECK(error_of(empty) == empty + ": the file is empty; expected lines of 'key: value'");
  }
  const std::string large = folder.write("large.yaml", std::string(2 << 20, 'a'));
  CHECK(error_of(large) == large + ": larger than 1 MB; this is not a config");
  CHECK_THAT(error_of("/" + std::string(5000, 'x')),
             ContainsSubstring("cannot be opened: File name too long"));
  CHECK_THAT(error_of(folder.write("bad.yaml", "a: [")),
             ContainsSubstring("/bad.yaml:1:4: this '[' is not closed"));
}
