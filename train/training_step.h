// One optimizer step of a language model: gradients of all passes, their norm, the update.
#pragma once

#include <memory>
#include <vector>

#include "core/cuda/graph.h"
#include "models/language_model.h"
#include "train/batches.h"
#include "train/run_config.h"

namespace headwater {

struct StepResult {
  double loss = 0.0;  ///< mean over the step's targets
  double gradient_norm = 0.0;
  bool applied = false;  ///< false: loss or norm was not finite, and nothing was changed
};

/// Everything between the batches and the updated parameters. What changes from step to step (tokens, learning rate,
/// number of the update) lies in tensors, never in arguments of kernels, so that on a GPU the whole step can be recorded
/// once as a CUDA graph and started in one go.
class TrainingStep {
 public:
  /// `use_graph`: record after the first steps; only on a GPU, without dropout and without state passing. Moments and
  /// parameters keep their places.
  TrainingStep(LanguageModel& model, const Tensor& moment1, const Tensor& moment2, const RunConfig& config,
               bool use_graph);
  ~TrainingStep();

  /// Starts a step on one batch for each pass. On a GPU it returns before the step is done: what the host does until
  /// finish() costs nothing. `step` counts from 0 and `update` from 1.
  void start(const std::vector<Batch>& batches, double learning_rate, int64_t step, int64_t update);
  /// Waits for the end of the step.
  StepResult finish();

  /// train.state_passing: the state with which each pass's rows go on. A step that is not applied leaves them.
  std::vector<LanguageModelState>& carried() { return carried_; }

 private:
  class Staging;

  void stage(const std::vector<Batch>& batches);
  void run();
  void run_pass(size_t pass);
  void update_parameters();

  LanguageModel& model_;
  const Tensor moment1_, moment2_;
  const RunConfig config_;
  const bool use_graph_;
  Device device_;

  std::vector<Batch> batches_;  // where the kernels read them
  std::unique_ptr<Staging> staging_;
  Tensor schedule_;    // (4): learning rate, the moments' corrections, longest gradient
  Tensor n_targets_;   // (), i64: of all passes
  Tensor loss_;        // (), written: the mean over them
  Tensor square_sum_;  // (1), written: of the gradients
  Tensor plan_;        // (5), written: what plan_update makes of these
  int64_t step_ = 0;
  int64_t n_plain_steps_ = 0;
  std::unique_ptr<cuda::Graph> graph_;
  std::vector<LanguageModelState> carried_, next_carried_;
};

/// Whether a step can be recorded, with train.cuda_graph as the config has it. Throws an input error for "on" where it
/// cannot.
bool should_use_graph(const RunConfig& config, const LanguageModelConfig& model, Device device);

}  // namespace headwater
