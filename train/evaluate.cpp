#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "train/batches.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

/// Sums over the tokens predicted so far.
class Totals {
 public:
  /// `n_positions`: how long a row (or the stream) is, to be cut into bins.
  /// `tokens_are_bytes`: else bits per byte are unknown.
  Totals(int64_t n_positions, int64_t n_bins, bool tokens_are_bytes) : tokens_are_bytes_(tokens_are_bytes) {
    const int64_t count = std::clamp<int64_t>(n_bins, 1, std::max<int64_t>(1, n_positions));
    for (int64_t i = 0; i < count; ++i) {
      bins_.push_back({n_positions * i / count, n_positions * (i + 1) / count, 0.0, 0});
    }
  }

  /// One batch whose rows begin at position `first_position`.
  void add(const Batch& batch, const LinearCrossEntropyOutput& output, int64_t first_position) {
    const std::vector<double> losses = output.row_losses.to_vector<double>();
    const int32_t* targets = batch.targets.data<int32_t>();
    const std::vector<uint8_t> correct = output.row_correct.to_vector<uint8_t>();
    const int64_t length = batch.tokens.dim(1);
    for (size_t i = 0; i < losses.size(); ++i) {
      if (targets[i] == ignored_target) continue;
      ++n_targets_;
      n_correct_ += correct[i];
      n_bytes_ += tokens_are_bytes_ && targets[i] != ByteTokenizer::end_of_document;
      loss_ += losses[i];
      PositionBin& bin = bin_of(first_position + static_cast<int64_t>(i) % length);
      bin.loss += losses[i];
      ++bin.n_targets;
    }
  }

  Evaluation result() const {
    const double n = static_cast<double>(n_targets_);
    Evaluation evaluation;
    evaluation.loss = loss_ / n;
    evaluation.accuracy = static_cast<double>(n_correct_) / n;
    evaluation.bits_per_byte = n_bytes_ > 0 ? loss_ / std::log(2.0) / static_cast<double>(n_bytes_) : 0.0;
    evaluation.n_targets = n_targets_;
    evaluation.n_bytes = n_bytes_;
    for (PositionBin bin : bins_) {
      if (bin.n_targets == 0) continue;
      bin.loss /= static_cast<double>(bin.n_targets);
      evaluation.bins.push_back(bin);
    }
    return evaluation;
  }

 private:
  PositionBin& bin_of(int64_t position) {
    const auto found =
        std::find_if(bins_.begin(), bins_.end(), [=](const PositionBin& bin) { return position < bin.end; });
    return found == bins_.end() ? bins_.back() : *found;
  }

  const bool tokens_are_bytes_;
  std::vector<PositionBin> bins_;
  double loss_ = 0.0;
  int64_t n_targets_ = 0, n_correct_ = 0, n_bytes_ = 0;
};

bool has_byte_tokens(const TokenShard& shard) {
  return shard.info().tokenizer_hash == ByteTokenizer::hash();
}

Evaluation evaluate_rows(const LanguageModel& model, const std::shared_ptr<const TokenShard>& shard,
                         const EvaluateOptions& options) {
  const EvaluationRows rows(shard, options.length);
  const int64_t wanted =
      options.max_tokens > 0 ? (options.max_tokens + options.length - 1) / options.length : rows.n_rows();
  const int64_t n_rows = std::min(wanted, rows.n_rows());
  Totals totals(options.length, options.position_bins, has_byte_tokens(*shard));
  for (int64_t row = 0; row < n_rows; row += options.batch) {
    const Batch batch = rows.batch(row, std::min(options.batch, n_rows - row));
    const LanguageModel::Hidden hidden = model.forward(batch.tokens, {}, batch.resets);
    totals.add(batch, model.loss(hidden.hidden, batch.targets), 0);
  }
  return totals.result();
}

Evaluation evaluate_stream(const LanguageModel& model, const TokenShard& shard,
                           const EvaluateOptions& options) {
  const int64_t n_tokens =
      options.max_tokens > 0 ? std::min(options.max_tokens, shard.n_tokens()) : shard.n_tokens();
  Totals totals(n_tokens, options.position_bins, has_byte_tokens(shard));
  LanguageModelState state;
  for (int64_t begin = 0; begin < n_tokens; begin += options.length) {
    const Batch batch = shard_piece(shard, begin, std::min(options.length, n_tokens - begin));
    LanguageModel::Hidden hidden = model.forward(batch.tokens, state, batch.resets);
    totals.add(batch, model.loss(hidden.hidden, batch.targets), begin);
    state = std::move(hidden.state);
  }
  return totals.result();
}

}  // namespace

double Evaluation::perplexity() const {
  return std::exp(loss);
}

std::string Evaluation::text() const {
  std::string result = fmt::format("loss {:.4f}  perplexity {:.3f}  accuracy {:.2f}%  tokens {}\n", loss,
                                   perplexity(), 100.0 * accuracy, n_targets);
  if (n_bytes > 0) result += fmt::format("bits per byte {:.4f}\n", bits_per_byte);
  for (const PositionBin& bin : bins) {
    result += fmt::format("  positions {} to {}: loss {:.4f}\n", bin.begin, bin.end - 1, bin.loss);
  }
  return result;
}

std::string Evaluation::json() const {
  nlohmann::ordered_json json{
      {"loss", loss},         {"perplexity", perplexity()}, {"bits_per_byte", bits_per_byte},
      {"accuracy", accuracy}, {"tokens", n_targets},        {"bytes", n_bytes}};
  for (const PositionBin& bin : bins) {
    json["by_position"].push_back(
        {{"begin", bin.begin}, {"end", bin.end}, {"loss", bin.loss}, {"tokens", bin.n_targets}});
  }
  return json.dump();
}

Evaluation evaluate(const LanguageModel& model, const std::shared_ptr<const TokenShard>& shard,
                    const EvaluateOptions& options) {
  require(options.length >= 1 && options.batch >= 1,
          "evaluate: length is {} and batch {}; both must be at least 1", options.length, options.batch);
  shard->require_vocab_size(model.vocab_size());
  const NoGradient no_gradient;
  const Evaluation result =
      options.stream ? evaluate_stream(model, *shard, options) : evaluate_rows(model, shard, options);
  require(result.n_targets > 0, "{}: there is no token to predict in it", shard->path().string());
  return result;
}

}  // namespace headwater
