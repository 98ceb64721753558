#include "train/run_config.h"

#include "tests/catch.h"
#include "tests/error_text.h"
#include "train/yaml.h"

using namespace headwater;

namespace {

/// A run config together with a model of one option.
struct Sample {
  RunConfig config;
  int64_t d_model = 64;
  Options options;

  explicit Sample(const std::string& yaml) {
    config.declare(options,
                   [this](Options& model) { model.integer("d_model", &d_model, "width").at_least(1); });
    options.read(parse_yaml(yaml, "x.yaml"), "");
  }
};

std::string invalid(const std::string& yaml) {
  return input_error_of([&] { Sample(yaml).config.validate(); });
}

}  // namespace

TEST_CASE("run config: the defaults are valid and read back as they were written") {
  const Sample sample("run: runs/a\ndata: {train: data/train.bin}\n");
  sample.config.validate_for_training();
  const std::string written = sample.options.write();
  const Sample again(written);
  CHECK(again.options.write() == written);
  CHECK_THAT(written, ContainsSubstring("model:\n  d_model: 64\n"));
  CHECK_THAT(written, ContainsSubstring(
                          "optimizer:\n  learning_rate: 0.003\n  betas: [0.9, 0.95]\n  epsilon: 1e-08\n"));
}

TEST_CASE("run config: every option has a meaning") {
  const Sample sample("run: runs/a");
  for (const OptionDescription& option : sample.options.list()) {
    INFO(option.path);
    CHECK(!option.meaning.empty());
  }
}

TEST_CASE("run config: the size of a step") {
  CHECK(Sample("train: {batch: 12}").config.sequences_per_step() == 12);
  CHECK(Sample("train: {batch: 12}").config.sequences_per_pass() == 12);
  CHECK(Sample("train: {batch: 12, micro_batch: 3}").config.accumulation() == 4);
  const Sample by_tokens("train: {batch_tokens: 1024, micro_batch: 2}\ndata: {length: 128}");
  by_tokens.config.validate();
  CHECK(by_tokens.config.sequences_per_step() == 8);
  CHECK(by_tokens.config.accumulation() == 4);
  CHECK(Sample(by_tokens.options.write()).config.sequences_per_step() == 8);
  CHECK(input_error_of([] { Sample("train:\n  batch_tokens: 512\n  batch: 2\n"); }) ==
        "x.yaml:3: train.batch has no effect here: train.batch_tokens already says how large a step is");
}

TEST_CASE("run config: parts that do not fit together are refused with both keys") {
  CHECK(invalid("train: {batch_tokens: 1000}") ==
        "train.batch_tokens (1000) must be a multiple of data.length (256)");
  CHECK(invalid("train: {batch: 8, micro_batch: 3}") ==
        "train.micro_batch (3) must divide the sequences of a step (8, from train.batch)");
  CHECK(invalid("train: {batch: 8, micro_batch: 16}") ==
        "train.micro_batch (16) must divide the sequences of a step (8, from train.batch)");
  CHECK(invalid("train: {batch_tokens: 512, micro_batch: 4}") ==
        "train.micro_batch (4) must divide the sequences of a step (2, from train.batch_tokens)");
  CHECK(invalid("train: {batch: 9223372036854775807}") ==
        "train.batch (9223372036854775807) times data.length (256) is more tokens than 64 bits can count");
  CHECK(invalid("train: {state_passing: true}\ndata: {packing: documents}") ==
        "train.state_passing needs data.packing: stream, but it is 'documents': a row must continue the row "
        "before it");
  CHECK(invalid("train: {steps: 10}\nschedule: {warmup_steps: 11}") ==
        "schedule.warmup_steps (11) must not exceed train.steps (10)");
  CHECK(invalid("train: {steps: 10}\nschedule: {type: wsd, warmup_steps: 9}") ==
        "schedule.warmup_steps (9) and schedule.decay_fraction (0.2: 2 steps) exceed train.steps (10)");
  CHECK(invalid("checkpoint: {every: 10, keep_every: 25}") ==
        "checkpoint.keep_every (25) must be a multiple of checkpoint.every (10), when checkpoints are made");
  CHECK_THAT(invalid("checkpoint: {keep_every: 25}"), ContainsSubstring("multiple of checkpoint.every (0)"));
  CHECK(invalid("eval: {every: 10}") ==
        "eval.every is 10, but data.validation names no tokens to evaluate on");
  CHECK_THAT(invalid("device: gpu"), ContainsSubstring("gpu"));
  CHECK(invalid("train: {steps: 10}\nschedule: {type: wsd, warmup_steps: 8}") == "(no error)");
}

TEST_CASE("run config: an option of another schedule is refused") {
  CHECK(input_error_of([] { Sample("schedule:\n  type: cosine\n  decay_fraction: 0.1\n"); }) ==
        "x.yaml:3: schedule.decay_fraction has no effect here: only a schedule of type wsd has a decay of "
        "its own "
        "length");
  CHECK(input_error_of([] { Sample("schedule: {type: constant, final_ratio: 0.1}"); }) ==
        "x.yaml:1: schedule.final_ratio has no effect here: a schedule of type constant ends at its peak");
}

TEST_CASE("run config: training needs a folder and tokens") {
  const auto missing = [](const std::string& yaml) {
    return input_error_of([&] { Sample(yaml).config.validate_for_training(); });
  };
  CHECK_THAT(missing("data: {train: a.bin}"), ContainsSubstring("run is not given"));
  CHECK_THAT(missing("run: runs/a"), ContainsSubstring("data.train is not given"));
}

TEST_CASE("run config: what changes between two runs is listed") {
  const Sample before("train: {batch: 8}");
  const Sample after("train: {batch: 16}\nschedule: {type: constant}");
  CHECK(config_changes(parse_yaml(before.options.write(), "before"),
                       parse_yaml(after.options.write(), "after")) ==
        std::vector<std::string>{"train.batch: 8 -> 16", "schedule.type: cosine -> constant",
                                 "schedule.final_ratio: 0.1 -> (not given)"});
}
