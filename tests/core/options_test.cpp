#include "core/options.h"

#include <clocale>
#include <limits>
#include <stdexcept>

#include "core/config_scalar.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "train/yaml.h"

using namespace headwater;

namespace {

/// One option of every kind.
struct Sample {
  int64_t steps = 100;
  double rate = 0.003;
  bool bias = true;
  std::string name = "first run";
  std::string type = "cosine";
  std::vector<std::string> tags = {"a", "b"};
  std::optional<int64_t> rank;
  std::optional<double> dropout = 0.5;
  std::array<double, 2> betas = {0.9, 0.95};
  std::array<std::optional<double>, 2> dt_limit = {0.0, std::nullopt};
  int64_t d_state = 16;
  int64_t head_dim = 64;
  double decay = 0.2;
  std::string layers = "[]";

  void declare(Options& options) {
    options.integer("steps", &steps, "how long").at_least(1);
    options.real("rate", &rate, "how fast").above(0).at_most(1);
    options.boolean("bias", &bias, "whether there is one");
    options.text("name", &name, "what it is called");
    options.text("type", &type, "which curve").one_of({"constant", "cosine", "wsd"});
    options.text_list("tags", &tags, "what it is about");
    options.optional_integer("rank", &rank, "null: computed").at_least(1);
    options.optional_real("dropout", &dropout, "null: none").at_least(0).below(1);
    options.real_pair("betas", &betas, "decays").at_least(0).below(1);
    options.limits("dt_limit", &dt_limit, "clamp");
    Options& mixer = options.group("mixer", "the mixer");
    mixer.integer("d_state", &d_state, "state size").at_least(1).alias("ssm_size");
    mixer.integer("head_dim", &head_dim, "channels of a head").at_least(1).alias("headdim");
    options.real("decay", &decay, "last part");
    options.used_if(
        "decay", [this] { return type == "wsd"; }, "only type wsd decays");
    options.custom(
        "layers", "one entry a layer",
        [this](const ConfigValue& value, const std::string& path) {
          require(value.kind == ConfigValue::Kind::sequence, "{}: {} is not a list", value.where(), path);
          layers = flow_text(value);
        },
        [this] { return layers; }, [] { return std::string("each a map\nwith a type"); });
  }
};

Sample read_sample(const std::string& yaml) {
  Sample sample;
  Options options;
  sample.declare(options);
  options.read(parse_yaml(yaml, "configs/x.yaml"), "");
  return sample;
}

std::string refusal(const std::string& yaml) {
  return input_error_of([&] { read_sample(yaml); });
}

std::string write_sample(Sample sample) {
  Options options;
  sample.declare(options);
  return options.write();
}

std::string describe_sample(const std::string& key) {
  Sample sample;
  Options options;
  sample.declare(options);
  return options.describe(key);
}

ConfigValue scalar(const std::string& text) {
  ConfigValue value;
  value.kind = ConfigValue::Kind::scalar;
  value.text = text;
  return value;
}

}  // namespace

TEST_CASE("options: every kind is read") {
  const Sample sample = read_sample(
      "steps: +20\nrate: 1e-3\nbias: false\nname: 007\ntype: 'wsd'\ntags: [x, \"y z\"]\nrank: 4\ndropout: "
      "null\n"
      "betas: [0, .5]\ndt_limit: [-.inf, 2]\nmixer: {d_state: 8, headdim: 32}\ndecay: 1\nlayers: [{type: "
      "s5}]\n");
  CHECK(sample.steps == 20);
  CHECK(sample.rate == 1e-3);
  CHECK(sample.bias == false);
  CHECK(sample.name == "007");
  CHECK(sample.type == "wsd");
  CHECK(sample.tags == std::vector<std::string>{"x", "y z"});
  CHECK(sample.rank == 4);
  CHECK(sample.dropout == std::nullopt);
  CHECK(sample.betas == std::array<double, 2>{0, 0.5});
  CHECK(sample.dt_limit[0] == std::nullopt);
  CHECK(sample.dt_limit[1] == 2);
  CHECK(sample.d_state == 8);
  CHECK(sample.head_dim == 32);
  CHECK(sample.decay == 1);
  CHECK(sample.layers == "[{type: s5}]");
}

TEST_CASE("options: what is not given keeps its default, and an empty group is an empty map") {
  const Sample sample = read_sample("mixer:\n  # d_state: 8\nsteps: 5\n");
  CHECK(sample.d_state == 16);
  CHECK(sample.steps == 5);
  CHECK(sample.rate == 0.003);
}

TEST_CASE("options: integers are refused with a reason") {
  const std::string expected = "; expected an integer >= 1";
  CHECK(refusal("bias: true\nsteps: abc\n") == "configs/x.yaml:2: steps is 'abc'" + expected);
  CHECK(refusal("steps: 0") == "configs/x.yaml:1: steps is '0'" + expected);
  CHECK(refusal("steps: 1.5") == "configs/x.yaml:1: steps is '1.5'" + expected);
  CHECK(refusal("steps: 1e3") == "configs/x.yaml:1: steps is '1e3'" + expected + " (write 1000)");
  CHECK(refusal("steps: 1000.0") == "configs/x.yaml:1: steps is '1000.0'" + expected + " (write 1000)");
  CHECK(refusal("steps: 010") ==
        "configs/x.yaml:1: steps is '010'" + expected + " (leading zero: octal or decimal?)");
  CHECK(refusal("steps: 0x10") == "configs/x.yaml:1: steps is '0x10'" + expected + " (write it in decimal)");
  CHECK(refusal("steps: 1_000") == "configs/x.yaml:1: steps is '1_000'" + expected + " (write 1000)");
  CHECK(refusal("steps: '10'") ==
        "configs/x.yaml:1: steps is '10'" + expected + " (write 10 without quotes)");
  CHECK(refusal("steps: 9223372036854775808") ==
        "configs/x.yaml:1: steps is '9223372036854775808'" + expected + " (it does not fit in 64 bits)");
  CHECK(refusal("steps: .nan") == "configs/x.yaml:1: steps is '.nan'" + expected);
  CHECK(refusal("steps: +-5") == "configs/x.yaml:1: steps is '+-5'" + expected);
  CHECK(refusal("steps: ''") == "configs/x.yaml:1: steps is ''" + expected);
  CHECK(refusal("steps:\n") == "configs/x.yaml:1: steps is null" + expected);
  CHECK(refusal("steps: [1]") == "configs/x.yaml:1: steps is a list of 1" + expected);
  CHECK(refusal("steps: {a: 1}") == "configs/x.yaml:1: steps is a map" + expected);
  CHECK(refusal("rank: 0") == "configs/x.yaml:1: rank is '0'; expected an integer >= 1 or null");
  CHECK(read_sample("steps: 9223372036854775807").steps == std::numeric_limits<int64_t>::max());
}

TEST_CASE("options: reals are refused with a reason") {
  const std::string expected = "; expected a number > 0 and <= 1";
  CHECK(refusal("rate: 0") == "configs/x.yaml:1: rate is '0'" + expected);
  CHECK(refusal("rate: 1.5") == "configs/x.yaml:1: rate is '1.5'" + expected);
  CHECK(refusal("rate: fast") == "configs/x.yaml:1: rate is 'fast'" + expected);
  CHECK(refusal("rate: 0,5") == "configs/x.yaml:1: rate is '0,5'" + expected + " (write 0.5)");
  CHECK(refusal("rate: 00.5") ==
        "configs/x.yaml:1: rate is '00.5'" + expected + " (leading zero: octal or decimal?)");
  for (const std::string text : {".nan", "NaN", "nan", ".inf", "-.Inf", "inf", "Infinity", "-Infinity"}) {
    CHECK(refusal("rate: " + text) ==
          "configs/x.yaml:1: rate is '" + text + "'" + expected + " (only finite numbers)");
  }
  CHECK(refusal("rate: 1e999") ==
        "configs/x.yaml:1: rate is '1e999'" + expected + " (it is outside the range of a 64-bit number)");
  CHECK(refusal("dropout: 1") == "configs/x.yaml:1: dropout is '1'; expected a number >= 0 and < 1 or null");
}

TEST_CASE("options: only true and false are booleans") {
  const std::string expected = "; expected true or false";
  CHECK(refusal("bias: yes") == "configs/x.yaml:1: bias is 'yes'" + expected + " (write true)");
  CHECK(refusal("bias: Off") == "configs/x.yaml:1: bias is 'Off'" + expected + " (write false)");
  CHECK(refusal("bias: True") == "configs/x.yaml:1: bias is 'True'" + expected + " (write true)");
  CHECK(refusal("bias: 'false'") == "configs/x.yaml:1: bias is 'false'" + expected + " (write false)");
  CHECK(refusal("bias: maybe") == "configs/x.yaml:1: bias is 'maybe'" + expected);
}

TEST_CASE("options: texts and lists are refused with a reason") {
  CHECK(refusal("name:") == "configs/x.yaml:1: name is null; expected text (write \"\" for an empty text)");
  CHECK(refusal("name: [a]") == "configs/x.yaml:1: name is a list of 1; expected text");
  CHECK(refusal("type: cosin") ==
        "configs/x.yaml:1: type is 'cosin'; expected one of constant, cosine, wsd (did you mean 'cosine'?)");
  CHECK(refusal("type: square") ==
        "configs/x.yaml:1: type is 'square'; expected one of constant, cosine, wsd");
  CHECK(refusal("tags: a") == "configs/x.yaml:1: tags is 'a'; expected a list of texts (write [a])");
  CHECK(refusal("tags: [a, [b]]") == "configs/x.yaml:1: tags.1 is a list of 1; expected text");
  CHECK(refusal("betas: [0.9]") ==
        "configs/x.yaml:1: betas is a list of 1; expected a list of 2 numbers, each >= 0 and < 1");
  CHECK(refusal("betas:\n  - 0.9\n  - 1\n") ==
        "configs/x.yaml:3: betas.1 is '1'; expected a number >= 0 and < 1");
  CHECK(refusal("dt_limit: [a, 1]") == "configs/x.yaml:1: dt_limit.0 is 'a'; expected a number or null");
  CHECK(refusal("dt_limit: [.inf, null]") ==
        "configs/x.yaml:1: dt_limit.0 is '.inf'; expected a number or null (only finite numbers)");
  CHECK(refusal("dt_limit: [2, 1]") ==
        "configs/x.yaml:1: dt_limit is [2, 1]; the lower limit must not be above the upper one");
  CHECK(refusal("dt_limit: 3") ==
        "configs/x.yaml:1: dt_limit is '3'; expected a list [lower, upper] of numbers or null");
}

TEST_CASE("options: unknown names are reported with the nearest and all known ones") {
  CHECK(refusal("steps: 1\nmixer:\n  d_sate: 8\n") ==
        "configs/x.yaml:3: mixer.d_sate is not an option of mixer. Did you mean 'd_state'? Known: d_state, "
        "head_dim.");
  CHECK(refusal("head_dim: 8") ==
        "configs/x.yaml:1: head_dim is not an option. Did you mean 'mixer.head_dim'? Known: steps, rate, "
        "bias, name, "
        "type, tags, rank, dropout, betas, dt_limit, mixer, decay, layers.");
  CHECK_THAT(refusal("zebra: 8"), ContainsSubstring("zebra is not an option. Known: steps,"));
  CHECK_THAT(refusal("a_zebra_that_goes_on: 8\nsteps: bad"), ContainsSubstring("is not an option"));
  CHECK(refusal("mixer: 3") ==
        "configs/x.yaml:1: mixer is '3'; expected a map of options: d_state, head_dim");
  CHECK_THAT(refusal("[1, 2]"),
             ContainsSubstring("configs/x.yaml:1: the config is a list of 2; expected a map"));
}

TEST_CASE("options: a name and its alias together are refused") {
  CHECK(refusal("mixer:\n  head_dim: 8\n  headdim: 16\n") ==
        "configs/x.yaml:3: mixer.headdim is the same option as mixer.head_dim (configs/x.yaml:2); give only "
        "one of "
        "them");
  CHECK(refusal("mixer: {headdim: 0}") == "configs/x.yaml:1: mixer.headdim is '0'; expected an integer >= 1");
}

TEST_CASE("options: an option without effect is refused, and left out when writing") {
  CHECK(refusal("decay: 0.1\ntype: cosine\n") ==
        "configs/x.yaml:1: decay has no effect here: only type wsd decays");
  CHECK(read_sample("decay: 0.1\ntype: wsd\n").decay == 0.1);
  CHECK_THAT(write_sample({}), !ContainsSubstring("decay"));
  Sample wsd;
  wsd.type = "wsd";
  CHECK_THAT(write_sample(wsd), ContainsSubstring("\ndecay: 0.2\n"));
}

TEST_CASE("options: declaring a name twice is a mistake in the program") {
  int64_t value = 0;
  Options options;
  options.integer("a", &value, "").alias("b");
  options.integer("b", &value, "");
  CHECK_THROWS_AS(options.read(parse_yaml("a: 1", "x"), ""), std::logic_error);
  CHECK_THROWS_AS(options.used_if(
                      "c", [] { return true; }, ""),
                  std::logic_error);
}

TEST_CASE("options: the resolved config") {
  CHECK(write_sample({}) ==
        "steps: 100\nrate: 0.003\nbias: true\nname: \"first run\"\ntype: cosine\ntags: [a, b]\nrank: null\n"
        "dropout: 0.5\nbetas: [0.9, 0.95]\ndt_limit: [0, null]\nmixer:\n  d_state: 16\n  head_dim: "
        "64\nlayers: []\n");
  Sample sample;
  Options options;
  sample.declare(options);
  const std::string flow = options.write_flow();
  CHECK_THAT(flow,
             ContainsSubstring("{steps: 100, rate: 0.003, ") && ContainsSubstring("mixer: {d_state: 16, "));
  CHECK(write_sample(read_sample(flow)) == write_sample({}));
}

TEST_CASE("options: what was written reads back to the same bits") {
  Sample sample;
  for (const double number : {0.1, 1.0 / 3, 5e-324, 1.0, 2.2250738585072014e-308}) {
    sample.rate = number;
    CHECK(read_sample(write_sample(sample)).rate == number);
  }
  sample.dropout = 0;
  sample.dt_limit = {-1.7976931348623157e308, 1e300};
  CHECK(read_sample(write_sample(sample)).dt_limit == sample.dt_limit);
  CHECK(read_sample(write_sample(sample)).dropout == 0.0);
  for (const std::string text : {"",
                                 " ",
                                 "null",
                                 "~",
                                 "true",
                                 "No",
                                 "12",
                                 "1e3",
                                 ".inf",
                                 "a: b",
                                 "a #b",
                                 "#a",
                                 "- a",
                                 "[a",
                                 "{a",
                                 "a,b",
                                 "&a",
                                 "*a",
                                 "!a",
                                 "'",
                                 "\"",
                                 "\\",
                                 "|",
                                 ">",
                                 "%",
                                 "@",
                                 "`",
                                 "a\nb",
                                 "\ttab",
                                 "a\r\nb",
                                 "caf\xC3\xA9/\xE6\xB0\xB4",
                                 "\x01\x1f\x7f",
                                 "C:\\runs",
                                 "runs/a-b_c.d",
                                 "---",
                                 "...",
                                 "?",
                                 ":",
                                 "-",
                                 "=",
                                 "<<"}) {
    sample.name = text;
    sample.tags = {text, "plain", text};
    const Sample again = read_sample(write_sample(sample));
    CHECK(again.name == text);
    CHECK(again.tags == sample.tags);
  }
}

TEST_CASE("options: values longer than YAML's limit for keys are written and read") {
  Sample sample;
  sample.name = std::string(5000, 'x') + " y";
  sample.tags.assign(2000, "a tag");
  const Sample again = read_sample(write_sample(sample));
  CHECK(again.name == sample.name);
  CHECK(again.tags == sample.tags);
}

TEST_CASE("options: numbers do not depend on the locale") {
  const std::string before = std::setlocale(LC_ALL, nullptr);
  if (std::setlocale(LC_ALL, "de_DE.UTF-8")) {
    CHECK(real_text(0.5) == "0.5");
    CHECK(parse_real(scalar("0.5")).value == 0.5);
  }
  std::setlocale(LC_ALL, before.c_str());
}

TEST_CASE("options: describe") {
  CHECK(describe_sample("mixer.d_state") ==
        "mixer.d_state: integer, >= 1; default 16\n    state size\n    also spelled ssm_size\n");
  CHECK(describe_sample("mixer.headdim") == describe_sample("head_dim"));
  CHECK(describe_sample("decay") ==
        "decay: number; default 0.2\n    last part\n    (only type wsd decays)\n");
  CHECK(describe_sample("type") ==
        "type: text, one of constant, cosine, wsd; default cosine\n    which curve\n");
  CHECK_THAT(describe_sample("mixer"), ContainsSubstring("mixer:\n    the mixer\nmixer.d_state:") &&
                                           ContainsSubstring("mixer.head_dim:"));
  CHECK(describe_sample("layers.0.type") ==
        "layers:\n    one entry a layer\n    each a map\n    with a type\n");
  CHECK_THAT(describe_sample(""),
             ContainsSubstring("steps: integer, >= 1; default 100\n    how long\nrate:"));
  CHECK(input_error_of([] { describe_sample("mixer.d_sate"); }) ==
        "'mixer.d_sate' is not an option. Did you mean 'mixer.d_state'?");
  CHECK(input_error_of([] { describe_sample("zebra.stripes"); }) == "'zebra.stripes' is not an option.");
}

TEST_CASE("options: a list of all of them") {
  Sample sample;
  Options options;
  sample.declare(options);
  const std::vector<OptionDescription> all = options.list("top");
  REQUIRE(all.size() == 15);
  CHECK(all[0].path == "top.steps");
  CHECK(all[0].type == "integer");
  CHECK(all[0].range == ">= 1");
  CHECK(all[0].default_text == "100");
  CHECK(all[11].path == "top.mixer.d_state");
  CHECK(all[11].aliases == std::vector<std::string>{"ssm_size"});
}

TEST_CASE("nearest_name: slips of the keyboard") {
  const std::vector<std::string> names = {"d_state", "d_conv", "expand", "dt_rank"};
  CHECK(nearest_name("d_sate", names) == "d_state");
  CHECK(nearest_name("d_tsate", names) == "d_state");
  CHECK(nearest_name("D_STATE", names) == "d_state");
  CHECK(nearest_name("exapnd", names) == "expand");
  CHECK(nearest_name("dcnv", names) == "");  // two edits in four letters
  CHECK(nearest_name("heads", names) == "");
  CHECK(nearest_name("", names) == "");
  CHECK(nearest_name("ab", {"ac", "ad"}) == "ac");
  CHECK(nearest_name("ab", {"ba"}) == "ba");
}

TEST_CASE("config_changes: each difference is listed") {
  const ConfigValue before =
      parse_yaml("a: 1\nb: {c: x, d: [1, 2]}\nl: [{r: 1}, {r: 2}]\ngone: null\n", "before");
  const ConfigValue after =
      parse_yaml("l: [{r: 1}, {r: 3}]\na: 2\nb: {c: 'x', d: [1, 3], e: y z}\n", "after");
  CHECK(config_changes(before, after) ==
        std::vector<std::string>{"a: 1 -> 2", "b.d: [1, 2] -> [1, 3]", "b.e: (not given) -> \"y z\"",
                                 "l.1.r: 2 -> 3", "gone: null -> (not given)"});
  CHECK(config_changes(before, before).empty());
}

TEST_CASE("excerpt: long texts are cut between characters") {
  CHECK(excerpt("a\nb") == "a b");
  const std::string cut = excerpt(std::string(59, 'x') + "\xC3\xA9" + "yyy");
  CHECK(cut == std::string(59, 'x') + "...");
}
