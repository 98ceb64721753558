// Text from a model, token by token.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "models/language_model.h"

namespace headwater {

struct GenerateOptions {
  int64_t n_tokens = 300;
  double temperature = 0.8;  ///< 0: always the most likely token
  int64_t top_k = 0;         ///< draw from the k most likely tokens; 0: all
  double top_p = 1.0;        ///< draw from the fewest tokens that hold this share of the probability
  uint64_t seed = 0;
  bool stop_at_end = true;  ///< stop where the document ends
};

struct GenerateReport {
  int64_t n_prompt_tokens = 0;
  int64_t n_tokens = 0;
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
};

/// Reads `prompt` (bytes) in pieces by the chunked form, then draws tokens one by one, the state handed on: memory and
/// time per token do not depend on the position. `emit` gets each piece of text as soon as it is whole UTF-8.
/// An empty prompt starts a new document. Same seed, same text.
GenerateReport generate(const LanguageModel& model, const std::string& prompt, const GenerateOptions& options,
                        const std::function<void(const std::string&)>& emit);

/// The token drawn from `logits` (vocab_size numbers) at `position`; tokens >= `n_allowed` are never drawn (rows that
/// only pad the vocabulary).
int32_t draw_token(const float* logits, int64_t n_allowed, const GenerateOptions& options, int64_t position);

}  // namespace headwater
