// Loss, perplexity, bits per byte and accuracy of a model on a shard.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "models/language_model.h"
#include "train/token_shard.h"

namespace headwater {

struct EvaluateOptions {
  int64_t length = 256;    ///< tokens per row, or per piece of the stream
  int64_t batch = 8;       ///< rows at a time; a stream has one
  int64_t max_tokens = 0;  ///< look at no more than this; 0: all
  int64_t position_bins = 8;
  /// One stream from the shard's first token to its last, the state carried from piece to piece: constant memory at
  /// any length. Otherwise every row starts from a zero state.
  bool stream = false;
};

/// Positions [begin, end) of a row (or of the stream), and the mean loss of the tokens predicted there.
struct PositionBin {
  int64_t begin, end;
  double loss;
  int64_t n_targets;
};

struct Evaluation {
  double loss = 0.0;      ///< mean over the predicted tokens, in nats
  double accuracy = 0.0;  ///< share of tokens that were the most likely one
  double bits_per_byte =
      0.0;  ///< all bits, divided by the predicted tokens that are bytes; 0 where there are none
  int64_t n_targets = 0;
  int64_t n_bytes = 0;
  std::vector<PositionBin> bins;

  double perplexity() const;
  /// A few lines for people.
  std::string text() const;
  /// One line of JSON.
  std::string json() const;
};

/// Throws an input error if the shard has a token outside the model's vocabulary, or nothing to predict.
Evaluation evaluate(const LanguageModel& model, const std::shared_ptr<const TokenShard>& shard,
                    const EvaluateOptions& options);

}  // namespace headwater
