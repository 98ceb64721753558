#include "train/batches.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/random.h"

namespace headwater {
namespace {

// Each use of randomness has a stream of its own, plus the number of the epoch.
constexpr uint64_t offset_stream = stream_id("batches.offset");
constexpr uint64_t row_stream = stream_id("batches.rows");
constexpr uint64_t document_stream = stream_id("batches.documents");

/// Puts pieces of a shard into the rows of a batch.
class BatchBuilder {
 public:
  BatchBuilder(const TokenShard& shard, int64_t n_rows, int64_t length)
      : shard_(shard),
        length_(length),
        tokens_(Tensor::zeros({n_rows, length}, DType::i32)),
        targets_(Tensor::full({n_rows, length}, ignored_target, DType::i32)),
        resets_(Tensor::zeros({n_rows, length}, DType::i32)) {}

  /// Tokens [begin, begin + count) of the shard, with targets and resets, to `place` and on in `row`.
  void put(int64_t row, int64_t place, int64_t begin, int64_t count) {
    const int64_t where = row * length_ + place;
    int32_t* targets = targets_.data<int32_t>() + where;
    int32_t* resets = resets_.data<int32_t>() + where;
    shard_.copy(begin, count, tokens_.data<int32_t>() + where);
    shard_.copy(begin + 1, std::min(count, shard_.n_tokens() - begin - 1), targets);

    const int64_t document = shard_.document_of(begin);
    int64_t start = shard_.document_start(document);
    if (start < begin) start = shard_.document_start(document + 1);
    for (; start <= begin + count && start < shard_.n_tokens(); start = shard_.next_document_start(start)) {
      if (start > begin) targets[start - begin - 1] = ignored_target;
      if (start < begin + count) resets[start - begin] = 1;
    }
  }

  Batch finish(bool starts_fresh) {
    int32_t* begin = resets_.data<int32_t>();
    int32_t* end = begin + resets_.numel();
    if (starts_fresh) {
      for (int32_t* row = begin; row < end; row += length_) *row = 0;
    }
    const bool has_resets = std::find(begin, end, 1) != end;
    return {.tokens = tokens_,
            .targets = targets_,
            .resets = has_resets ? resets_ : Tensor(),
            .starts_fresh = starts_fresh};
  }

 private:
  const TokenShard& shard_;
  int64_t length_;
  Tensor tokens_;
  Tensor targets_;
  Tensor resets_;
};

/// How many rows of `length` a shard gives. Where rows begin at a random offset below `length`, an epoch does
/// with so many as fit behind every offset, but at least one a lane.
int64_t count_rows(int64_t n_tokens, const BatchOptions& options) {
  if (options.packing == Packing::documents) return n_tokens / options.length;
  const int64_t n_lanes = options.packing == Packing::sequential ? options.n_lanes : 1;
  const int64_t n_at_most = (n_tokens - 1) / options.length / n_lanes;
  const int64_t n_behind_every_offset = (n_tokens - options.length) / options.length / n_lanes;
  return n_lanes * std::max(n_behind_every_offset, std::min<int64_t>(n_at_most, 1));
}

}  // namespace

Packing parse_packing(const std::string& name) {
  if (name == "stream") return Packing::stream;
  if (name == "documents") return Packing::documents;
  if (name == "sequential") return Packing::sequential;
  throw_input_error("'{}' is no way to pack rows; known: stream, documents, sequential", name);
}

BatchSource::BatchSource(std::shared_ptr<const TokenShard> shard, const BatchOptions& options)
    : shard_(std::move(shard)), options_(options) {
  require(options.length >= 1, "data.length is {}; it must be at least 1", options.length);
  require(options.n_lanes >= 1, "packing: sequential with {} lanes; there must be at least 1",
          options.n_lanes);
  rows_per_epoch_ = count_rows(shard_->n_tokens(), options);
  require(
      rows_per_epoch_ > 0,
      "data.length is {}, and {} has only {} tokens: too few for one row{}; lower data.length or prepare "
      "more text",
      options.length, shard_->path().string(), shard_->n_tokens(),
      options.packing == Packing::sequential ? fmt::format(" for each of {} lanes", options.n_lanes) : "");
}

Batch BatchSource::batch(int64_t first_index, int64_t count) {
  require(first_index >= 0 && count >= 1,
          "a batch of {} samples from {} on: neither may be negative, nor the batch empty", count,
          first_index);
  bool starts_fresh = true;
  if (options_.packing == Packing::sequential) {
    const int64_t step = first_index / options_.n_lanes;
    require((first_index + count - 1) / options_.n_lanes == step,
            "packing: sequential: samples {} to {} do not belong to one step of {} lanes", first_index,
            first_index + count - 1, options_.n_lanes);
    starts_fresh = first_index % rows_per_epoch_ < options_.n_lanes;
  }
  BatchBuilder builder(*shard_, count, options_.length);
  for (int64_t row = 0; row < count; ++row) {
    for_each_piece(first_index + row, [&](int64_t place, int64_t begin, int64_t n_tokens) {
      builder.put(row, place, begin, n_tokens);
    });
  }
  return builder.finish(starts_fresh);
}

/// Calls put(place in the row, index of the first token, number of tokens) for each piece of sample `index`.
template <class Put>
void BatchSource::for_each_piece(int64_t index, const Put& put) {
  const int64_t epoch = epoch_of(index);
  switch (options_.packing) {
    case Packing::stream:
      return put(0, epoch_offset(epoch) + shuffled_row(index) * options_.length, options_.length);
    case Packing::sequential:
      return put(0, epoch_offset(epoch) + sequential_row(index) * options_.length, options_.length);
    case Packing::documents:
      return for_each_document_piece(epoch, shuffled_row(index), put);
  }
}

template <class Put>
void BatchSource::for_each_document_piece(int64_t epoch, int64_t row, const Put& put) {
  const std::vector<int64_t>& ends = document_ends(epoch);
  const Permutation order = document_permutation(epoch);
  const int64_t row_begin = row * options_.length;
  const int64_t row_end = row_begin + options_.length;
  size_t rank = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), row_begin) - ends.begin());
  for (int64_t place = row_begin; place < row_end; place = ends[rank++]) {
    const int64_t document_begin = rank == 0 ? 0 : ends[rank - 1];
    const int64_t first_token = shard_->document_start(order.at(static_cast<int64_t>(rank)));
    put(place - row_begin, first_token + place - document_begin, std::min(ends[rank], row_end) - place);
  }
}

/// Where the epoch's first row begins.
int64_t BatchSource::epoch_offset(int64_t epoch) const {
  const int64_t n_spare = shard_->n_tokens() - 1 - rows_per_epoch_ * options_.length;
  const uint64_t n_offsets = static_cast<uint64_t>(std::min(options_.length, n_spare + 1));
  return static_cast<int64_t>(
      RandomStream(options_.seed, offset_stream + static_cast<uint64_t>(epoch)).below(n_offsets));
}

int64_t BatchSource::shuffled_row(int64_t index) const {
  const uint64_t stream = row_stream + static_cast<uint64_t>(epoch_of(index));
  return Permutation(rows_per_epoch_, options_.seed, stream).at(index % rows_per_epoch_);
}

/// Lane l reads rows l * n_steps, l * n_steps + 1, ...
int64_t BatchSource::sequential_row(int64_t index) const {
  const int64_t n_steps = rows_per_epoch_ / options_.n_lanes;
  const int64_t lane = index % options_.n_lanes;
  const int64_t step = index % rows_per_epoch_ / options_.n_lanes;
  return lane * n_steps + step;
}

Permutation BatchSource::document_permutation(int64_t epoch) const {
  return {shard_->n_documents(), options_.seed, document_stream + static_cast<uint64_t>(epoch)};
}

/// Kept until another epoch is asked for: 8 bytes a document.
const std::vector<int64_t>& BatchSource::document_ends(int64_t epoch) {
  std::vector<int64_t>& ends = document_order_.ends;
  if (document_order_.epoch == epoch) return ends;
  const Permutation order = document_permutation(epoch);
  ends.resize(static_cast<size_t>(order.size()));
  int64_t end = 0;
  for (int64_t rank = 0; rank < order.size(); ++rank) {
    const int64_t document = order.at(rank);
    const int64_t size = shard_->document_start(document + 1) - shard_->document_start(document);
    require(size > 0, "{}: the beginnings of its documents are out of order; prepare it again",
            shard_->path().string());
    end += size;
    ends[static_cast<size_t>(rank)] = end;
  }
  document_order_.epoch = epoch;
  return ends;
}

EvaluationRows::EvaluationRows(std::shared_ptr<const TokenShard> shard, int64_t length)
    : shard_(std::move(shard)), length_(length) {
  require(length >= 1, "an evaluation length of {}; it must be at least 1", length);
  const int64_t n_predicted = shard_->n_tokens() - 1;
  require(n_predicted > 0, "{}: has one token only: there is nothing to predict", shard_->path().string());
  n_rows_ = (n_predicted - 1) / length + 1;
}

Batch EvaluationRows::batch(int64_t first_row, int64_t count) const {
  require(first_row >= 0 && first_row < n_rows_ && count >= 1,
          "{} rows from row {} on: the evaluation has {} rows", count, first_row, n_rows_);
  const int64_t n_rows = std::min(count, n_rows_ - first_row);
  BatchBuilder builder(*shard_, n_rows, length_);
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t begin = (first_row + row) * length_;
    builder.put(row, 0, begin, std::min(length_, shard_->n_tokens() - begin));
  }
  return builder.finish(true);
}

Batch shard_piece(const TokenShard& shard, int64_t begin, int64_t count) {
  require(begin >= 0 && begin < shard.n_tokens() && count >= 1,
          "{}: {} tokens from {} on were asked for, it has {}", shard.path().string(), count, begin,
          shard.n_tokens());
  const int64_t n_tokens = std::min(count, shard.n_tokens() - begin);
  BatchBuilder builder(shard, 1, n_tokens);
  builder.put(0, 0, begin, n_tokens);
  return builder.finish(begin == 0);
}

}  // namespace headwater
