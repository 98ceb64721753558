#include "train/run_config.h"

#include <limits>

#include "core/device.h"
#include "core/error.h"

namespace headwater {

void DataConfig::declare(Options& options) {
  options.text("train", &train, "training tokens: a shard (.bin), or a folder with train.bin");
  options.text("validation", &validation,
               "validation tokens: a shard, a folder with validation.bin, or empty for none");
  options.integer("length", &length, "tokens per row").at_least(1);
  options
      .text("packing", &packing,
            "stream: rows are cut from one endless stream of tokens; documents: the same, and every document "
            "starts "
            "from an empty state")
      .one_of({"stream", "documents"});
}

void TrainConfig::declare(Options& options) {
  options.integer("steps", &steps, "optimizer steps of the whole run").at_least(1);
  options.integer("batch", &batch, "sequences per optimizer step").at_least(1);
  options.used_if(
      "batch", [this] { return !batch_tokens; }, "train.batch_tokens already says how large a step is");
  options.optional_integer("batch_tokens", &batch_tokens, "tokens per optimizer step, instead of train.batch")
      .at_least(1);
  options
      .optional_integer(
          "micro_batch", &micro_batch,
          "sequences per forward and backward pass, gradients being accumulated; null: all at once")
      .at_least(1);
  options.integer("seed", &seed, "of initial values and of the order of the data").at_least(0);
  options.boolean(
      "state_passing", &state_passing,
      "start each batch from the state that the one before ended with (truncated backpropagation)");
  options.text("recompute", &recompute, "what backward computes again instead of keeping it in memory")
      .one_of({"none", "blocks"});
  options
      .text("precision", &precision,
            "of activations and matrix products; bf16 (on a GPU) keeps parameters, decays, states and sums "
            "in f32; f64 "
            "(on the CPU) is for checks")
      .one_of({"f32", "bf16", "f64"});
  options
      .text("cuda_graph", &cuda_graph,
            "start each step on a GPU as one recorded graph; auto: where nothing changes from step to step "
            "but the data")
      .one_of({"auto", "on", "off"});
  options
      .integer("max_skipped_steps", &max_skipped_steps,
               "steps in a row that may be skipped for NaN or infinity before the run stops")
      .at_least(0);
  options.integer("log_every", &log_every, "steps between two lines of the log").at_least(1);
  options.optional_real("time_limit_s", &time_limit_s, "save and stop after so many seconds; null: no limit")
      .above(0);
}

DType parse_precision(const std::string& precision) {
  return precision == "bf16" ? DType::bf16 : (precision == "f64" ? DType::f64 : DType::f32);
}

void OptimizerConfig::declare(Options& options) {
  options.real("learning_rate", &learning_rate, "peak of the learning rate").above(0);
  options.real_pair("betas", &betas, "AdamW: decay of the first and of the second moment")
      .at_least(0)
      .below(1);
  options.real("epsilon", &epsilon, "AdamW: added to the root of the second moment").above(0);
  options
      .real("weight_decay", &weight_decay,
            "AdamW: decay of the weights that are matrices, times the learning rate")
      .at_least(0);
  options.real("max_grad_norm", &max_grad_norm, "longer gradients are scaled down to this norm; 0: never")
      .at_least(0);
}

void CheckpointConfig::declare(Options& options) {
  options.integer("every", &every, "steps between two checkpoints; 0: one at the end only").at_least(0);
  options.integer("keep_last", &keep_last, "how many of the latest checkpoints are kept").at_least(1);
  options
      .optional_integer("keep_every", &keep_every,
                        "checkpoints every so many steps are kept for good as well")
      .at_least(1);
}

void EvalConfig::declare(Options& options) {
  options.integer("every", &every, "steps between two evaluations; 0: one at the end only").at_least(0);
  options.integer("tokens", &tokens, "validation tokens that are looked at, at most; 0: all").at_least(0);
  options.optional_integer("length", &length, "tokens per evaluated row; null: data.length").at_least(1);
  options
      .integer("position_bins", &position_bins,
               "parts of a row whose loss is reported separately, at most one per token")
      .at_least(1);
}

void RunConfig::declare(Options& options, const std::function<void(Options& model)>& declare_model) {
  options.text("run", &run, "folder that the run is written to");
  options.text("device", &device, "where to compute: cpu, cuda or cuda:N");
  options.integer("threads", &threads, "CPU threads; 0: all cores").at_least(0).at_most(4096);
  data.declare(options.group("data", "the tokens and how rows are made of them"));
  declare_model(options.group("model", "what is trained"));
  train.declare(options.group("train", "the run: how long, how large a step, how exact"));
  optimizer.declare(options.group("optimizer", "AdamW"));
  schedule.declare(options.group("schedule", "the learning rate over the run"));
  checkpoint.declare(options.group("checkpoint", "when checkpoints are written and how long they stay"));
  eval.declare(options.group("eval", "evaluation on the validation tokens"));
}

int64_t RunConfig::sequences_per_step() const {
  return train.batch_tokens ? *train.batch_tokens / data.length : train.batch;
}

int64_t RunConfig::sequences_per_pass() const {
  return train.micro_batch.value_or(sequences_per_step());
}

namespace {

void check_batch(const RunConfig& config) {
  const TrainConfig& train = config.train;
  if (train.batch_tokens) {
    require(*train.batch_tokens % config.data.length == 0,
            "train.batch_tokens ({}) must be a multiple of data.length ({})", *train.batch_tokens,
            config.data.length);
  }
  const int64_t sequences = config.sequences_per_step();
  require(sequences <= std::numeric_limits<int64_t>::max() / config.data.length,
          "train.batch ({}) times data.length ({}) is more tokens than 64 bits can count", sequences,
          config.data.length);
  require(sequences % config.sequences_per_pass() == 0,
          "train.micro_batch ({}) must divide the sequences of a step ({}, from train.{})",
          config.sequences_per_pass(), sequences, train.batch_tokens ? "batch_tokens" : "batch");
}

void check_schedule(const ScheduleConfig& schedule, int64_t steps) {
  require(schedule.warmup_steps <= steps, "schedule.warmup_steps ({}) must not exceed train.steps ({})",
          schedule.warmup_steps, steps);
  if (schedule.type != "wsd") return;
  const int64_t decay_steps = schedule.decay_steps(steps);
  require(schedule.warmup_steps + decay_steps <= steps,
          "schedule.warmup_steps ({}) and schedule.decay_fraction ({}: {} steps) exceed train.steps ({})",
          schedule.warmup_steps, schedule.decay_fraction, decay_steps, steps);
}

void check_checkpoint(const CheckpointConfig& checkpoint) {
  if (!checkpoint.keep_every) return;
  require(checkpoint.every > 0 && *checkpoint.keep_every % checkpoint.every == 0,
          "checkpoint.keep_every ({}) must be a multiple of checkpoint.every ({}), when checkpoints are made",
          *checkpoint.keep_every, checkpoint.every);
}

void check_eval(const EvalConfig& eval, const DataConfig& data) {
  require(eval.every == 0 || !data.validation.empty(),
          "eval.every is {}, but data.validation names no tokens to evaluate on", eval.every);
}

}  // namespace

void RunConfig::validate() const {
  const bool on_cpu = parse_device(device).is_cpu();
  require(!on_cpu || train.precision != "bf16", "train.precision is bf16, which needs a GPU: device: cuda");
  require(on_cpu || train.precision != "f64",
          "train.precision is f64, which only the CPU computes: device: cpu");
  require(
      !train.state_passing || data.packing == "stream",
      "train.state_passing needs data.packing: stream, but it is '{}': a row must continue the row before it",
      data.packing);
  check_batch(*this);
  check_schedule(schedule, train.steps);
  check_checkpoint(checkpoint);
  check_eval(eval, data);
}

void RunConfig::validate_for_training() const {
  require(!run.empty(), "run is not given; write the folder for this run, e.g. run=runs/first");
  require(!data.train.empty(),
          "data.train is not given; write the path of the training tokens, e.g. "
          "data.train=data/train.bin (headwater prepare makes one)");
  validate();
}

}  // namespace headwater
