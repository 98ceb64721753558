#include "train/generate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "core/random.h"
#include "train/token_step.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

constexpr int64_t prefill_length = 2048;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

int32_t draw_token(const float* logits, int64_t n_allowed, const GenerateOptions& options, int64_t position) {
  const auto most_likely = std::max_element(logits, logits + n_allowed);
  if (options.temperature == 0.0) return static_cast<int32_t>(most_likely - logits);
  std::vector<int32_t> order(n_allowed);
  std::iota(order.begin(), order.end(), 0);
  // Ties by token number: the same order on every machine.
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  if (options.top_k > 0) order.resize(std::min<size_t>(order.size(), options.top_k));
  std::vector<double> weights(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    weights[i] = std::exp((static_cast<double>(logits[order[i]]) - *most_likely) / options.temperature);
  }
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double kept = 0.0;
  size_t n_kept = 0;
  while (n_kept < weights.size() && kept < options.top_p * total) kept += weights[n_kept++];
  n_kept = std::max<size_t>(n_kept, 1);
  RandomStream random(options.seed, stream_id("generate") + static_cast<uint64_t>(position));
  double left = random.uniform() * std::accumulate(weights.begin(), weights.begin() + n_kept, 0.0);
  for (size_t i = 0; i + 1 < n_kept; ++i) {
    left -= weights[i];
    if (left < 0.0) return order[i];
  }
  return order[n_kept - 1];
}

GenerateReport generate(const LanguageModel& model, const std::string& prompt, const GenerateOptions& options,
                        const std::function<void(const std::string&)>& emit) {
  require(options.n_tokens >= 0, "--tokens is {}; it must not be negative", options.n_tokens);
  require(options.temperature >= 0.0, "--temperature is {}; it must be 0 or more", options.temperature);
  require(options.top_p > 0.0 && options.top_p <= 1.0, "--top-p is {}; it must be in (0, 1]", options.top_p);
  require(options.top_k >= 0, "--top-k is {}; it must not be negative", options.top_k);
  std::vector<int32_t> tokens = ByteTokenizer::encode(prompt);
  // What comes after the end of a document is the beginning of one.
  if (tokens.empty()) tokens.push_back(ByteTokenizer::end_of_document);
  const int64_t n_allowed = std::min<int64_t>(model.vocab_size(), ByteTokenizer::vocab_size);
  GenerateReport report;
  report.n_prompt_tokens = static_cast<int64_t>(tokens.size());

  TokenStep step(model);
  std::vector<float> logits;
  const Clock::time_point start = Clock::now();
  for (size_t begin = 0; begin < tokens.size(); begin += prefill_length) {
    const size_t end = std::min(tokens.size(), begin + prefill_length);
    logits = step.advance({tokens.begin() + begin, tokens.begin() + end});
  }
  report.prefill_seconds = seconds_since(start);

  StreamingDecoder decoder;
  const Clock::time_point decode_start = Clock::now();
  while (report.n_tokens < options.n_tokens) {
    const int32_t token = draw_token(logits.data(), n_allowed, options, report.n_tokens);
    if (options.stop_at_end && token == ByteTokenizer::end_of_document) break;
    emit(decoder.next(token));
    ++report.n_tokens;
    if (report.n_tokens < options.n_tokens) logits = step.advance({token});
  }
  emit(decoder.finish());
  report.decode_seconds = seconds_since(decode_start);
  return report;
}

}  // namespace headwater
