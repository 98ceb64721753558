// What a run is told: every part of a config but the model, which declares itself.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "core/dtype.h"
#include "core/options.h"
#include "train/schedule.h"

namespace headwater {

struct DataConfig {
  std::string train;
  std::string validation;
  int64_t length = 256;
  std::string packing = "stream";

  void declare(Options& options);
};

struct TrainConfig {
  int64_t steps = 1000;
  int64_t batch = 8;
  std::optional<int64_t> batch_tokens;
  std::optional<int64_t> micro_batch;
  int64_t seed = 0;
  bool state_passing = false;
  std::string recompute = "none";
  std::string precision = "f32";
  std::string cuda_graph = "auto";
  int64_t max_skipped_steps = 10;
  int64_t log_every = 10;
  std::optional<double> time_limit_s;

  void declare(Options& options);
};

/// f32, bf16 or f64: what `precision` names.
DType parse_precision(const std::string& precision);

struct OptimizerConfig {
  double learning_rate = 3e-3;
  std::array<double, 2> betas = {0.9, 0.95};
  double epsilon = 1e-8;
  double weight_decay = 0.1;
  double max_grad_norm = 1.0;

  void declare(Options& options);
};

struct CheckpointConfig {
  int64_t every = 0;
  int64_t keep_last = 2;
  std::optional<int64_t> keep_every;

  void declare(Options& options);
};

struct EvalConfig {
  int64_t every = 0;
  int64_t tokens = 0;
  std::optional<int64_t> length;
  int64_t position_bins = 8;

  void declare(Options& options);
};

struct RunConfig {
  std::string run;
  std::string device = "cpu";
  int64_t threads = 0;
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  CheckpointConfig checkpoint;
  EvalConfig eval;

  /// Declares all options. `declare_model` declares the model's into the group `model`.
  void declare(Options& options, const std::function<void(Options& model)>& declare_model);

  /// Checks what no single option can tell: that the parts fit together. Throws an input error that names the
  /// keys.
  void validate() const;

  /// Checks in addition that what `train` cannot do without is given: the run's folder and the training
  /// tokens.
  void validate_for_training() const;

  /// Sequences in one optimizer step, whether given as `batch` or as `batch_tokens`.
  int64_t sequences_per_step() const;
  /// Sequences in one forward and backward pass.
  int64_t sequences_per_pass() const;
  /// Passes whose gradients one optimizer step adds up.
  int64_t accumulation() const { return sequences_per_step() / sequences_per_pass(); }
  /// Tokens in one row of an evaluation: the training length unless eval.length says otherwise.
  int64_t eval_length() const { return eval.length.value_or(data.length); }
};

}  // namespace headwater
