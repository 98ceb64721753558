// Training: batch -> loss -> backward -> clip -> update, and everything that makes a run safe to lose.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "models/language_model.h"
#include "train/batches.h"
#include "train/config.h"
#include "train/run_log.h"
#include "train/training_step.h"

namespace headwater {

/// Asks a running trainer to finish its step, save and return; a second request ends the process at once. Safe to
/// call from a signal handler.
void request_stop();
/// SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) call request_stop().
void install_stop_signals();

/// What a checkpoint holds besides the model and the optimizer's moments.
struct TrainerState {
  int64_t step = 0;         ///< steps done, skipped ones included
  int64_t n_updates = 0;    ///< optimizer updates done
  int64_t next_sample = 0;  ///< global sample index: all that the order of the data needs
  int64_t skipped_in_row = 0;
  int64_t n_skipped = 0;
};

/// One run. Same config, same bits, run to run; resuming continues bit for bit.
class Trainer {
 public:
  /// Opens the data, checks that everything fits, makes the model. Does not touch the disk.
  explicit Trainer(Config config);
  ~Trainer();

  /// Starts from freshly drawn parameters.
  void initialize();
  /// Starts from a checkpoint of this run. Throws an input error that lists every difference where the config or the
  /// data do not fit it. `accept_data_change`: go on with other tokens than before.
  void load_checkpoint(const Path& checkpoint, bool accept_data_change);

  /// Trains to the last step, writing into the run's folder. Returns when done, at the time limit, or on request_stop();
  /// a checkpoint of where it ended is on disk then. Throws a fell-short error, after a checkpoint, when too many steps
  /// in a row had no finite loss or gradient.
  void run();

  /// One optimizer step.
  StepReport step();

  Config& config() { return config_; }
  LanguageModel& model() { return *model_; }
  const TrainerState& state() const { return state_; }
  /// Parameters, memory, flops per step: what `train --dry-run` prints.
  std::string summary() const;
  Path save_checkpoint();

 private:
  std::vector<Batch> next_batches();
  std::string first_non_finite_gradient() const;
  void evaluate_now();
  void after_step(const StepReport& report);
  bool time_is_up() const;

  Config config_;
  std::shared_ptr<const TokenShard> train_shard_, validation_shard_;
  std::unique_ptr<BatchSource> batches_;
  std::unique_ptr<LanguageModel> model_;
  Tensor moment1_, moment2_;  // like the flat parameters
  TrainerState state_;
  std::unique_ptr<TrainingStep> training_step_;
  std::vector<Batch> prefetched_;  // of the next step, if they were read while the last one ran
  std::unique_ptr<RunLog> log_;
  double run_start_seconds_ = 0.0;  // on the steady clock
  std::vector<double> recent_step_seconds_;
};

/// `headwater train` and `headwater resume`: everything from the config to the finished run.
void train(Config config);
void resume(const Path& run_folder, const std::vector<std::string>& overrides, const std::string& checkpoint,
            bool accept_data_change);

/// The checkpoint folder that `path` means: itself if it holds a model, else the latest checkpoint of the run there.
Path resolve_checkpoint(const Path& path);

/// resolve_checkpoint, and every file held against the manifest's hashes where there is one.
Path intact_checkpoint(const Path& path);

/// The shard that a config names: a file, or `name`.bin in a folder. Verifies its contents.
std::shared_ptr<const TokenShard> open_shard(const std::string& path, const std::string& name);

}  // namespace headwater
