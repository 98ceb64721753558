#include "train/batches.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/random.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"
#include "tests/test_data.h"
#include "train/prepare.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

/// A shard whose token i is i, so that a batch shows where each of its tokens comes from.
class CountingShard {
 public:
  explicit CountingShard(const std::vector<int64_t>& document_sizes) {
    TokenShardWriter writer(folder_.path() / "train.bin", 1 << 24, 0);
    int32_t next = 0;
    for (const int64_t size : document_sizes) {
      starts.insert(next);
      std::vector<int32_t> tokens(static_cast<size_t>(size));
      for (int32_t& token : tokens) token = next++;
      writer.append(tokens, 0);
      writer.end_document();
    }
    n_tokens = next;
    writer.finish();
    shard = TokenShard::open(folder_.path() / "train.bin");
  }

  std::set<int32_t> starts;
  int32_t n_tokens = 0;
  std::shared_ptr<const TokenShard> shard;

 private:
  TemporaryFolder folder_;
};

struct Row {
  std::vector<int32_t> tokens;
  std::vector<int32_t> targets;
  std::vector<int32_t> resets;  // zeros where the batch has none
  bool operator==(const Row&) const = default;
};

std::vector<Row> rows_of(const Batch& batch) {
  const int64_t n_rows = batch.tokens.dim(0);
  const size_t length = static_cast<size_t>(batch.tokens.dim(1));
  const auto row_of = [&](const Tensor& tensor, int64_t row) {
    return tensor.defined() ? tensor.narrow(row, row + 1).to_vector<int32_t>()
                            : std::vector<int32_t>(length, 0);
  };
  std::vector<Row> rows;
  for (int64_t row = 0; row < n_rows; ++row) {
    rows.push_back({row_of(batch.tokens, row), row_of(batch.targets, row), row_of(batch.resets, row)});
  }
  return rows;
}

std::vector<Row> rows_of_epoch(BatchSource& source, int64_t epoch) {
  return rows_of(source.batch(epoch * source.rows_per_epoch(), source.rows_per_epoch()));
}

/// Targets and resets must be what the tokens' places in the shard say.
void check_row(const CountingShard& counting, const Row& row, bool starts_fresh) {
  for (size_t t = 0; t < row.tokens.size(); ++t) {
    const int32_t token = row.tokens[t];
    const bool has_target = token + 1 < counting.n_tokens && !counting.starts.contains(token + 1);
    CHECK(row.targets[t] == (has_target ? token + 1 : ignored_target));
    CHECK(row.resets[t] == (counting.starts.contains(token) && (t > 0 || !starts_fresh)));
  }
}

bool is_contiguous(const Row& row) {
  return std::adjacent_find(row.tokens.begin(), row.tokens.end(),
                            [](int32_t a, int32_t b) { return b != a + 1; }) == row.tokens.end();
}

std::vector<int64_t> random_sizes(RandomStream& random, uint64_t n_documents, uint64_t max_size) {
  std::vector<int64_t> sizes(1 + random.below(n_documents));
  for (int64_t& size : sizes) size = 1 + static_cast<int64_t>(random.below(max_size));
  return sizes;
}

TEST_CASE("BatchSource stream: an epoch shows each row once, from an offset of its own") {
  const CountingShard counting({1003});
  BatchSource source(counting.shard, {.length = 10, .seed = 1});
  CHECK(source.rows_per_epoch() == 99);
  std::set<int32_t> offsets;
  std::set<std::vector<int32_t>> orders;
  for (int64_t epoch = 0; epoch < 30; ++epoch) {
    std::set<int32_t> begins;
    std::vector<int32_t> order;
    for (const Row& row : rows_of_epoch(source, epoch)) {
      CHECK(is_contiguous(row));
      begins.insert(row.tokens[0]);
      order.push_back(row.tokens[0] / 10);
    }
    REQUIRE(begins.size() == 99);
    CHECK(*begins.rbegin() - *begins.begin() == 980);
    CHECK(*begins.begin() < 10);
    offsets.insert(*begins.begin());
    orders.insert(order);
  }
  CHECK(offsets.size() > 6);
  CHECK(orders.size() == 30);
}

TEST_CASE("BatchSource stream: targets and resets of random documents") {
  RandomStream random(1, "stream");
  for (int round = 0; round < 30; ++round) {
    const CountingShard counting(random_sizes(random, 30, 12));
    const int64_t length = 1 + static_cast<int64_t>(random.below(20));
    if (counting.n_tokens <= length) continue;
    BatchSource source(counting.shard, {.length = length, .seed = random.bits()});
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      for (const Row& row : rows_of_epoch(source, epoch)) {
        CHECK(is_contiguous(row));
        check_row(counting, row, true);
      }
    }
  }
}

TEST_CASE("BatchSource stream: every size of shard that holds a row can be read") {
  for (int64_t n_tokens = 2; n_tokens < 40; ++n_tokens) {
    const CountingShard counting({n_tokens});
    for (int64_t length = 1; length < n_tokens; ++length) {
      BatchSource source(counting.shard, {.length = length, .seed = 3});
      const int64_t n_left_out = n_tokens - source.rows_per_epoch() * length;
      CHECK(n_left_out >= 1);
      CHECK(n_left_out < 2 * length);
      for (int64_t epoch = 0; epoch < 4; ++epoch) rows_of_epoch(source, epoch);
    }
  }
}

TEST_CASE("BatchSource: a batch without documents inside its rows has no resets") {
  const CountingShard counting({100});
  BatchSource source(counting.shard, {.length = 10});
  const Batch batch = source.batch(0, 4);
  CHECK(!batch.resets.defined());
  CHECK(batch.starts_fresh);
  CHECK(batch.tokens.shape() == Shape{4, 10});
  CHECK(batch.targets.shape() == Shape{4, 10});
  const CountingShard divided({50, 50});
  BatchSource divided_source(divided.shard, {.length = 40});
  CHECK(divided_source.batch(0, 1).resets.shape() == Shape{1, 40});
}

TEST_CASE("BatchSource documents: an epoch shows each token at most once, documents uncut but for row ends") {
  RandomStream random(1, "documents");
  for (int round = 0; round < 30; ++round) {
    const CountingShard counting(random_sizes(random, 30, round % 2 ? 8 : 60));
    const int64_t length = 1 + static_cast<int64_t>(random.below(20));
    if (counting.n_tokens < length) continue;
    BatchSource source(counting.shard,
                       {.length = length, .packing = Packing::documents, .seed = random.bits()});
    CHECK(source.rows_per_epoch() == counting.n_tokens / length);
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      std::set<int32_t> seen;
      std::set<int32_t> expected_begins;  // of rows that continue a document
      std::set<int32_t> found_begins;
      for (const Row& row : rows_of_epoch(source, epoch)) {
        check_row(counting, row, true);
        seen.insert(row.tokens.begin(), row.tokens.end());
        for (size_t t = 1; t < row.tokens.size(); ++t) {
          CHECK((row.resets[t] == 1 || row.tokens[t] == row.tokens[t - 1] + 1));
          // A document begins only where another has ended.
          if (row.resets[t] == 1) CHECK(row.targets[t - 1] == ignored_target);
        }
        if (row.targets.back() != ignored_target) expected_begins.insert(row.targets.back());
        if (!counting.starts.contains(row.tokens[0])) found_begins.insert(row.tokens[0]);
      }
      CHECK(static_cast<int64_t>(seen.size()) == source.rows_per_epoch() * length);
      // What a row breaks off, another goes on with, but for the one piece that fills no row.
      CHECK(std::includes(expected_begins.begin(), expected_begins.end(), found_begins.begin(),
                          found_begins.end()));
      CHECK(expected_begins.size() <= found_begins.size() + 1);
    }
  }
}

TEST_CASE("BatchSource documents: each epoch has an order of its own") {
  const CountingShard counting(std::vector<int64_t>(50, 7));
  BatchSource source(counting.shard, {.length = 350, .packing = Packing::documents, .seed = 1});
  CHECK(source.rows_per_epoch() == 1);
  const Row first = rows_of_epoch(source, 0).at(0);
  const Row second = rows_of_epoch(source, 1).at(0);
  CHECK(first.tokens != second.tokens);
  CHECK(first == rows_of_epoch(source, 0).at(0));
  CHECK(std::is_permutation(first.tokens.begin(), first.tokens.end(), second.tokens.begin()));
}

TEST_CASE("BatchSource sequential: each lane goes on where it stopped") {
  RandomStream random(1, "sequential");
  for (int round = 0; round < 20; ++round) {
    const CountingShard counting(random_sizes(random, 60, 20));
    const int64_t length = 1 + static_cast<int64_t>(random.below(10));
    const int64_t n_lanes = 1 + static_cast<int64_t>(random.below(4));
    if (counting.n_tokens <= length * n_lanes) continue;
    BatchSource source(counting.shard,
                       {.length = length, .packing = Packing::sequential, .seed = 5, .n_lanes = n_lanes});
    const int64_t n_steps = source.rows_per_epoch() / n_lanes;
    CHECK(n_steps * n_lanes == source.rows_per_epoch());
    std::vector<Row> before;
    std::set<int32_t> seen;
    for (int64_t step = 0; step < 2 * n_steps; ++step) {
      const Batch batch = source.batch(step * n_lanes, n_lanes);
      CHECK(batch.starts_fresh == (step % n_steps == 0));
      if (batch.starts_fresh) seen.clear();
      const std::vector<Row> rows = rows_of(batch);
      for (size_t lane = 0; lane < rows.size(); ++lane) {
        CHECK(is_contiguous(rows[lane]));
        check_row(counting, rows[lane], batch.starts_fresh);
        if (!batch.starts_fresh) CHECK(rows[lane].tokens.front() == before[lane].tokens.back() + 1);
        for (const int32_t token : rows[lane].tokens) CHECK(seen.insert(token).second);
      }
      before = rows;
    }
  }
}

TEST_CASE("BatchSource: another split of the same samples gives the same samples, across epochs too") {
  const CountingShard counting({13, 40, 7, 60, 31, 9, 40});
  for (const Packing packing : {Packing::stream, Packing::documents, Packing::sequential}) {
    const BatchOptions options = {.length = 8, .packing = packing, .seed = 9, .n_lanes = 4};
    BatchSource source(counting.shard, options);
    for (int64_t step = 0; step < 20; ++step) {
      const std::vector<Row> whole = rows_of(source.batch(step * 4, 4));
      BatchSource resumed(counting.shard, options);
      for (const int64_t n_ranks : {1, 2, 4}) {
        std::vector<Row> joined;
        for (int64_t rank = 0; rank < n_ranks; ++rank) {
          const int64_t share = 4 / n_ranks;
          for (const Row& row : rows_of(resumed.batch(step * 4 + rank * share, share))) joined.push_back(row);
        }
        CHECK(joined == whole);
      }
    }
  }
}

TEST_CASE("BatchSource: another seed is another order") {
  const CountingShard counting(std::vector<int64_t>(40, 10));
  for (const Packing packing : {Packing::stream, Packing::documents}) {
    BatchSource first(counting.shard, {.length = 5, .packing = packing, .seed = 1});
    BatchSource second(counting.shard, {.length = 5, .packing = packing, .seed = 2});
    CHECK(rows_of_epoch(first, 0) != rows_of_epoch(second, 0));
  }
}

TEST_CASE("BatchSource: samples far beyond any training run are still found") {
  const CountingShard counting({100});
  BatchSource source(counting.shard, {.length = 10});
  const int64_t far = int64_t{1} << 60;
  CHECK(rows_of(source.batch(far, 2)) == rows_of(source.batch(far, 2)));
}

TEST_CASE("BatchSource: one row of a million tokens") {
  const int64_t length = 1000000;
  const CountingShard counting({length - 3, 4});
  BatchSource source(counting.shard, {.length = length});
  CHECK(source.rows_per_epoch() == 1);
  const Row row = rows_of(source.batch(0, 1)).at(0);
  CHECK(row.tokens.back() == length - 1);
  CHECK(row.resets[length - 3] == 1);
  CHECK(row.targets[length - 4] == ignored_target);
}

TEST_CASE("BatchSource: says what does not fit") {
  const CountingShard counting({10});
  const auto make = [&](const BatchOptions& options) { return BatchSource(counting.shard, options); };
  CHECK_THROWS_WITH(make({.length = 0}), ContainsSubstring("data.length is 0; it must be at least 1"));
  CHECK_THROWS_WITH(make({.length = 10}),
                    ContainsSubstring("data.length is 10, and " + counting.shard->path().string() +
                                      " has only 10 tokens: too few for one row; lower data.length"));
  CHECK_THROWS_AS(make({.length = INT64_MAX}), Error);
  CHECK_THROWS_WITH(make({.length = 11, .packing = Packing::documents}),
                    ContainsSubstring("data.length is 11"));
  CHECK(make({.length = 10, .packing = Packing::documents}).rows_per_epoch() == 1);
  CHECK_THROWS_WITH(make({.length = 3, .packing = Packing::sequential, .n_lanes = 4}),
                    ContainsSubstring("too few for one row for each of 4 lanes"));
  CHECK(make({.length = 3, .packing = Packing::sequential, .n_lanes = 3}).rows_per_epoch() == 3);
  CHECK_THROWS_WITH(make({.length = 3, .packing = Packing::sequential, .n_lanes = 0}),
                    ContainsSubstring("with 0 lanes"));

  BatchSource source = make({.length = 1, .packing = Packing::sequential, .n_lanes = 3});
  CHECK_THROWS_WITH(source.batch(2, 2),
                    ContainsSubstring("samples 2 to 3 do not belong to one step of 3 lanes"));
  CHECK_THROWS_WITH(source.batch(-1, 1), ContainsSubstring("neither may be negative"));
  CHECK_THROWS_AS(source.batch(0, 0), Error);
}

TEST_CASE("parse_packing: knows its three names") {
  CHECK(parse_packing("stream") == Packing::stream);
  CHECK(parse_packing("documents") == Packing::documents);
  CHECK(parse_packing("sequential") == Packing::sequential);
  CHECK_THROWS_WITH(parse_packing("steam"), ContainsSubstring("known: stream, documents, sequential"));
}

/// The tokens that a shard's documents let one predict, each once.
std::multiset<int32_t> predictable_tokens(const CountingShard& counting) {
  std::multiset<int32_t> tokens;
  for (int32_t token = 1; token < counting.n_tokens; ++token) {
    if (!counting.starts.contains(token)) tokens.insert(token);
  }
  return tokens;
}

void add_targets(const Row& row, std::multiset<int32_t>& targets) {
  for (const int32_t target : row.targets) {
    if (target != ignored_target) targets.insert(target);
  }
}

TEST_CASE("EvaluationRows: every token is predicted once, but for the first of each document") {
  RandomStream random(1, "evaluation");
  for (int round = 0; round < 40; ++round) {
    const CountingShard counting(random_sizes(random, 20, 12));
    if (counting.n_tokens < 2) continue;
    const int64_t length = 1 + static_cast<int64_t>(random.below(20));
    const int64_t batch_size = 1 + static_cast<int64_t>(random.below(4));
    const EvaluationRows evaluation(counting.shard, length);
    std::multiset<int32_t> predicted;
    int32_t next = 0;
    for (int64_t first = 0; first < evaluation.n_rows(); first += batch_size) {
      const Batch batch = evaluation.batch(first, batch_size);
      CHECK(batch.starts_fresh);
      CHECK(batch.tokens.dim(0) == std::min(batch_size, evaluation.n_rows() - first));
      for (Row row : rows_of(batch)) {
        const size_t n_real = static_cast<size_t>(std::min<int64_t>(length, counting.n_tokens - next));
        CHECK(std::count(row.targets.begin() + static_cast<int64_t>(n_real), row.targets.end(),
                         ignored_target) == length - static_cast<int64_t>(n_real));
        row.tokens.resize(n_real);
        CHECK(row.tokens.front() == next);
        CHECK(is_contiguous(row));
        check_row(counting, row, true);
        add_targets(row, predicted);
        next += static_cast<int32_t>(n_real);
      }
    }
    CHECK(predicted == predictable_tokens(counting));
  }
}

TEST_CASE("EvaluationRows: says what does not fit") {
  const CountingShard counting({10});
  CHECK_THROWS_WITH(EvaluationRows(counting.shard, 0), ContainsSubstring("it must be at least 1"));
  const EvaluationRows evaluation(counting.shard, 4);
  CHECK(evaluation.n_rows() == 3);
  CHECK_THROWS_WITH(evaluation.batch(3, 1),
                    ContainsSubstring("1 rows from row 3 on: the evaluation has 3 rows"));
  CHECK_THROWS_AS(evaluation.batch(-1, 1), Error);
  CHECK_THROWS_AS(evaluation.batch(0, 0), Error);
  const CountingShard single({1});
  CHECK_THROWS_WITH(EvaluationRows(single.shard, 1), ContainsSubstring("there is nothing to predict"));
}

TEST_CASE("shard_piece: pieces of any length read a shard from end to end") {
  RandomStream random(1, "pieces");
  for (int round = 0; round < 20; ++round) {
    const CountingShard counting(random_sizes(random, 20, 12));
    std::multiset<int32_t> predicted;
    int64_t begin = 0;
    while (begin < counting.n_tokens) {
      const int64_t count = 1 + static_cast<int64_t>(random.below(15));
      const Batch batch = shard_piece(*counting.shard, begin, count);
      CHECK(batch.starts_fresh == (begin == 0));
      const Row row = rows_of(batch).at(0);
      CHECK(row.tokens.front() == begin);
      CHECK(static_cast<int64_t>(row.tokens.size()) == std::min(count, counting.n_tokens - begin));
      CHECK(is_contiguous(row));
      check_row(counting, row, batch.starts_fresh);
      add_targets(row, predicted);
      begin += static_cast<int64_t>(row.tokens.size());
    }
    CHECK(predicted == predictable_tokens(counting));
    CHECK_THROWS_WITH(shard_piece(*counting.shard, begin, 1), ContainsSubstring("were asked for, it has"));
    CHECK_THROWS_AS(shard_piece(*counting.shard, 0, 0), Error);
  }
}

TEST_CASE("BatchSource: rows of real text are pieces of it, and targets of an end of document are ignored") {
  const std::optional<Path> shakespeare = find_test_data("tinyshakespeare.txt");
  if (!shakespeare) return;
  const std::string text = read_text_file(*shakespeare, 1 << 24);
  TemporaryFolder folder;
  prepare({.files = {*shakespeare}, .out = folder.path(), .split = DocumentSplit::blank_line});
  const auto shard = TokenShard::open(folder.path() / "train.bin");
  for (const Packing packing : {Packing::stream, Packing::documents}) {
    BatchSource source(shard, {.length = 256, .packing = packing, .seed = 7});
    for (const Row& row : rows_of(source.batch(0, 32))) {
      const auto end = std::find(row.tokens.begin(), row.tokens.end(), ByteTokenizer::end_of_document);
      const std::string piece = ByteTokenizer::decode(std::vector<int32_t>(row.tokens.begin(), end));
      CHECK(text.find(piece) != std::string::npos);
      for (size_t t = 0; t < row.tokens.size(); ++t) {
        const bool ends_document = row.tokens[t] == ByteTokenizer::end_of_document;
        CHECK((row.targets[t] == ignored_target) == ends_document);
        if (t + 1 < row.tokens.size()) CHECK((row.resets[t + 1] == 1) == ends_document);
      }
    }
  }
}

}  // namespace
}  // namespace headwater
