#include "train/json.h"

#include "tests/catch.h"
#include "tests/error_text.h"

using namespace headwater;

namespace {

std::string json_error(const std::string& text) {
  return input_error_of([&] { parse_json(text, "x.json"); });
}

std::string repeated(const std::string& text, int n_times) {
  std::string result;
  for (int i = 0; i < n_times; ++i) result += text;
  return result;
}

}  // namespace

TEST_CASE("json: the tree") {
  const ConfigValue root = parse_json(
      R"({"a": 1, "b": [1.50, -2e-3, true, null, "t\"x\u00e9"], "c": {"d": 18446744073709551615}, "e": "12"})",
      "x.json");
  CHECK(flow_text(root) ==
        "{a: 1, b: [1.50, -2e-3, true, null, \"t\\\"x\xC3\xA9\"], c: {d: 18446744073709551615}, e: \"12\"}");
  CHECK(root.find("a")->where() == "x.json");
  CHECK(parse_json("[]", "x.json").kind == ConfigValue::Kind::sequence);
}

TEST_CASE("json: infinity and NaN") {
  const ConfigValue list = parse_json(
      R"([Infinity, -Infinity, NaN, {"__float__": "Infinity"}, {"__float__": "-Infinity"}, "Infinity", "a\"NaN"])",
      "x.json");
  REQUIRE(list.items.size() == 7);
  const char* expected[] = {"Infinity", "-Infinity", "NaN", "Infinity", "-Infinity", "Infinity", "a\"NaN"};
  for (size_t i = 0; i < 7; ++i) {
    CHECK(list.items[i].kind == ConfigValue::Kind::scalar);
    CHECK(list.items[i].text == expected[i]);
    CHECK(list.items[i].quoted == (i >= 5));
  }
  CHECK(parse_json("Infinity", "x.json").text == "Infinity");
}

TEST_CASE("json: mistakes are refused") {
  CHECK(json_error(R"({"a": 1, "a": 2})") == "x.json: the key 'a' is given twice");
  CHECK(json_error(R"({"": 1})") == "x.json: an empty key");
  CHECK(json_error(repeated("[", 100000)) == "x.json: nested deeper than 64 levels");
  CHECK(json_error(repeated("{\"a\":", 100000)) == "x.json: nested deeper than 64 levels");
  CHECK_THAT(json_error("{\"a\": 1"), ContainsSubstring("x.json: parse error at line 1, column 8"));
  CHECK_THAT(json_error(""), ContainsSubstring("x.json: parse error"));
  CHECK_THAT(json_error("[1,]"), ContainsSubstring("x.json: parse error"));
  CHECK_THAT(json_error("[1] 2"), ContainsSubstring("x.json: parse error"));
  CHECK_THAT(json_error("[InfinityNaN]"), ContainsSubstring("x.json: parse error"));
  CHECK_THAT(json_error("\"\\"), ContainsSubstring("x.json: parse error"));
  CHECK_THAT(json_error("[\"\xFF\"]"), ContainsSubstring("x.json: parse error"));
}
