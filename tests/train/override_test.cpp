#include "train/override.h"

#include "tests/catch.h"
#include "tests/error_text.h"
#include "train/yaml.h"

using namespace headwater;

namespace {

std::string repeated(const std::string& text, int n_times) {
  std::string result;
  for (int i = 0; i < n_times; ++i) result += text;
  return result;
}

/// The config "a: 1, b: {c: [1, {d: 2}]}" after an override, or the error.
std::string overridden(const std::string& assignment) {
  ConfigValue root = parse_yaml("a: 1\nb:\n  c: [1, {d: 2}]\ne:\n", "x.yaml");
  const std::string error = input_error_of([&] { apply_override(root, assignment); });
  return error == "(no error)" ? flow_text(root) : error;
}

}  // namespace

TEST_CASE("overrides: values are set") {
  CHECK(overridden("a=2") == "{a: 2, b: {c: [1, {d: 2}]}, e: null}");
  CHECK(overridden("b.c.1.d=[1, 2]") == "{a: 1, b: {c: [1, {d: [1, 2]}]}, e: null}");
  CHECK(overridden("b.c.0={type: mamba2}") == "{a: 1, b: {c: [{type: mamba2}, {d: 2}]}, e: null}");
  CHECK(overridden("b=null") == "{a: 1, b: null, e: null}");
  CHECK(overridden("b=") == "{a: 1, b: null, e: null}");
  CHECK(overridden("e.f.g=x=y") == "{a: 1, b: {c: [1, {d: 2}]}, e: {f: {g: \"x=y\"}}}");
  CHECK(overridden("r.m=runs/x") == "{a: 1, b: {c: [1, {d: 2}]}, e: null, r: {m: runs/x}}");
  CHECK(overridden("a='1'") == "{a: \"1\", b: {c: [1, {d: 2}]}, e: null}");
}

TEST_CASE("overrides: an empty config can be filled") {
  ConfigValue root;
  apply_override(root, "train.steps=3");
  CHECK(flow_text(root) == "{train: {steps: 3}}");
  CHECK(root.find("train")->find("steps")->where() == "command line");
  CHECK(root.find("train")->where() == "command line");
}

TEST_CASE("overrides: mistakes are refused") {
  CHECK(overridden("model.d_model") == "command line: 'model.d_model' has no '='; write key=value");
  CHECK(overridden("a.x=1") == "command line: a.x cannot be set, for a is '1' (x.yaml:1)");
  CHECK(overridden("=1") == "command line: '' has an empty part; write key.key=value");
  CHECK(overridden("b..c=1") == "command line: 'b.' has an empty part; write key.key=value");
  for (const std::string index : {"2", "-1", "x", "1x", "99999999999999999999"}) {
    CHECK(overridden("b.c." + index + "=1") ==
          "command line: b.c." + index +
              " cannot be set, for b.c is a list of 2 (x.yaml:3); expected an index from 0 to 1");
  }
  CHECK(overridden("a=[1, 2") ==
        "command line: 'a=[1, 2':1:1: a key must be text, not a list; is a bracket not closed?");
  CHECK_THAT(overridden(repeated("a.", 100000) + "a=1"), ContainsSubstring("nested deeper than 64 levels"));
  CHECK_THAT(overridden("a=" + repeated("- ", 100000)), ContainsSubstring("nested deeper than 64 levels"));
}
