// Which tokens the model sees, in which order: token shards cut into rows, rows into batches.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/permutation.h"
#include "core/tensor.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"
#include "train/token_shard.h"

namespace headwater {

/// Rows of tokens and, for each position, the token that follows. What follows the last token of a document
/// is the beginning of another, which nobody can predict: that position has no target.
struct Batch {
  Tensor tokens;   ///< (batch, length) i32
  Tensor targets;  ///< (batch, length) i32, ignored_target where there is none
  Tensor resets;   ///< (batch, length) i32, 1 where a document begins; undefined if none begins inside a row
  /// True: the rows begin with a zero state, and a document that begins a row needs no reset. False: with the
  /// state at the end of the same rows of the batch before.
  bool starts_fresh = true;
};

/// How the tokens of a shard become the rows of an epoch.
enum class Packing {
  stream,      ///< the shard cut in pieces of `length`, from a random offset on; the pieces in random order
  documents,   ///< the documents in random order, one behind the other, cut likewise from their first on
  sequential,  ///< each lane of the batch reads a stretch of the shard of its own, its state carried along
};

/// Reads "stream", "documents" or "sequential". Throws an input error for anything else.
Packing parse_packing(const std::string& name);

struct BatchOptions {
  int64_t length = 0;  ///< tokens per row
  Packing packing = Packing::stream;
  uint64_t seed = 0;
  /// Packing::sequential only: rows of the global batch, those of all ranks and micro-batches together.
  int64_t n_lanes = 1;
};

/// The samples of a training run, numbered from 0 through all epochs. Sample `index` is a pure function of
/// the shard, the options and `index`: one integer resumes a run, on any number of ranks, in any
/// micro-batches.
///
/// An epoch shows each row once. Tokens that fill no whole row at its end are left out, others in each epoch:
/// fewer than 2 * length (times n_lanes where sequential). Not thread-safe.
class BatchSource {
 public:
  /// The contents of the shard should have been verified. Throws an input error that names data.length and
  /// the shard if it does not hold one row (with Packing::sequential: one for each lane), or if an option is
  /// below 1.
  BatchSource(std::shared_ptr<const TokenShard> shard, const BatchOptions& options);

  int64_t rows_per_epoch() const { return rows_per_epoch_; }
  int64_t epoch_of(int64_t index) const { return index / rows_per_epoch_; }

  /// Samples [first_index, first_index + count). With Packing::sequential, sample i belongs to lane i %
  /// n_lanes, and a batch holds lanes of one step only. Throws an input error for samples that break this
  /// rule, a negative index, or a count below 1.
  Batch batch(int64_t first_index, int64_t count);

 private:
  /// The documents of one epoch, one behind the other.
  struct DocumentOrder {
    int64_t epoch = -1;
    std::vector<int64_t> ends;  ///< place behind the last token of each, in the epoch's order
  };

  int64_t epoch_offset(int64_t epoch) const;
  int64_t shuffled_row(int64_t index) const;
  int64_t sequential_row(int64_t index) const;
  Permutation document_permutation(int64_t epoch) const;
  const std::vector<int64_t>& document_ends(int64_t epoch);

  template <class Put>
  void for_each_piece(int64_t index, const Put& put);
  template <class Put>
  void for_each_document_piece(int64_t epoch, int64_t row, const Put& put);

  std::shared_ptr<const TokenShard> shard_;
  BatchOptions options_;
  int64_t rows_per_epoch_ = 0;
  DocumentOrder document_order_;
};

/// A shard in its order, for evaluation: rows of `length` tokens that do not overlap, each begun with a zero
/// state. Every token is predicted exactly once, but for the first of each document.
class EvaluationRows {
 public:
  /// Throws an input error if `length` is below 1 or the shard has fewer than 2 tokens.
  EvaluationRows(std::shared_ptr<const TokenShard> shard, int64_t length);

  int64_t n_rows() const { return n_rows_; }
  /// Rows [first_row, first_row + count), fewer where the shard ends. The last row is filled up with token 0,
  /// without targets. Throws an input error if there is no such row or `count` is below 1.
  Batch batch(int64_t first_row, int64_t count) const;

 private:
  std::shared_ptr<const TokenShard> shard_;
  int64_t length_;
  int64_t n_rows_;
};

/// Tokens [begin, begin + count) of a shard, fewer where it ends, as one row; for reading a shard in pieces
/// of any length with the state carried along. Throws an input error unless 0 <= begin < n_tokens and count
/// >= 1.
Batch shard_piece(const TokenShard& shard, int64_t begin, int64_t count);

}  // namespace headwater
