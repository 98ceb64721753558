// Decoding: one token in, the logits of the next one out, the state kept in between.
#pragma once

#include <memory>
#include <vector>

#include "core/cuda/graph.h"
#include "models/language_model.h"

namespace headwater {

/// A sequence that is read piece by piece, batch 1. On a GPU the step of a single token is recorded as a CUDA graph, after
/// one that ran plainly and left a state of the same shapes: its kernels are so short that starting them one by one would
/// take longer than they do.
class TokenStep {
 public:
  explicit TokenStep(const LanguageModel& model);

  /// The logits after the last of `tokens`, on the CPU; the state moves on. Nothing is recorded for gradients.
  std::vector<float> advance(const std::vector<int32_t>& tokens);

 private:
  std::vector<float> advance_recorded(int32_t token);
  Variable last_logits(const Variable& hidden) const;

  const LanguageModel& model_;
  LanguageModelState state_;
  bool state_keeps_its_shapes_ = false;
  std::unique_ptr<cuda::Graph> graph_;
  Tensor token_;   // i32 (1, 1), what the graph reads
  Tensor logits_;  // (1, vocab_size), what it writes
};

}  // namespace headwater
