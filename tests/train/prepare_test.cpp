#include "train/prepare.h"

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/random.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"
#include "tests/test_data.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

/// A shard's text, '|' for each end of a document; checks that documents begin behind these.
std::string text_of(const Path& path) {
  const auto shard = TokenShard::open(path);
  shard->verify_contents();
  CHECK(shard->info().tokenizer_hash == ByteTokenizer::hash());
  std::string text;
  for (int64_t index = 0; index < shard->n_tokens(); ++index) {
    const int32_t token = shard->token(index);
    const bool ends_document = token == ByteTokenizer::end_of_document;
    CHECK(ends_document == (shard->next_document_start(index) == index + 1));
    text += ends_document ? '|' : static_cast<char>(token);
  }
  return text;
}

/// Writes texts to files 0, 1, ... and prepares them in the folder "out".
class Preparation {
 public:
  explicit Preparation(const std::vector<std::string>& texts, DocumentSplit split = DocumentSplit::file,
                       double validation_fraction = 0) {
    for (const std::string& text : texts) {
      options.files.push_back(folder.path() / std::to_string(options.files.size()));
      write_file_atomically(options.files.back(), text);
    }
    options.out = folder.path() / "out";
    options.split = split;
    options.validation_fraction = validation_fraction;
  }

  std::string train() const { return text_of(options.out / "train.bin"); }
  std::string validation() const { return text_of(options.out / "validation.bin"); }

  TemporaryFolder folder;
  PrepareOptions options;
};

std::string train_text(const std::vector<std::string>& texts, DocumentSplit split) {
  const Preparation preparation(texts, split);
  prepare(preparation.options);
  return preparation.train();
}

/// "train text / validation text".
std::string both_texts(const std::vector<std::string>& texts, DocumentSplit split,
                       double validation_fraction) {
  const Preparation preparation(texts, split, validation_fraction);
  prepare(preparation.options);
  return preparation.train() + " / " + preparation.validation();
}

TEST_CASE("prepare: a file is a document") {
  CHECK(train_text({"one\n\ntwo\n", "", "three"}, DocumentSplit::file) == "one\n\ntwo\n|three|");
}

TEST_CASE("prepare: a line is a document") {
  CHECK(train_text({"one\n\n  two\r\n \t\nthree", "four\n"}, DocumentSplit::line) == "one|  two|three|four|");
}

TEST_CASE("prepare: blank lines divide documents") {
  CHECK(train_text({"\n\none\ntwo\n\n \t\r\nthree\r\n\r\nfour", "five\n\n"}, DocumentSplit::blank_line) ==
        "one\ntwo|three|four|five|");
}

TEST_CASE("prepare: bytes that are not UTF-8 pass unchanged") {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(static_cast<char>(byte));
  CHECK(train_text({bytes}, DocumentSplit::file) == bytes + "|");
}

TEST_CASE("prepare: one document is cut at the byte") {
  CHECK(both_texts({"0123456789"}, DocumentSplit::file, 0.2) == "01234567| / 89|");
  CHECK(both_texts({"0123456789"}, DocumentSplit::file, 0.9) == "0| / 123456789|");
}

TEST_CASE("prepare: of many documents each stays whole") {
  const std::string lines = "aaa\nbbb\nccc\nddd\neee\nfff\n";
  CHECK(both_texts({lines}, DocumentSplit::line, 0.3) == "aaa|bbb|ccc|ddd| / eee|fff|");
  CHECK(both_texts({lines}, DocumentSplit::line, 0.4) == "aaa|bbb|ccc|ddd| / eee|fff|");
  CHECK(both_texts({lines}, DocumentSplit::line, 0.5) == "aaa|bbb|ccc| / ddd|eee|fff|");
}

TEST_CASE("prepare: a document is cut where the share held out would change by more than half") {
  CHECK(both_texts({"aaaaaaaaaa", "bbbbbbbbbb"}, DocumentSplit::file, 0.1) == "aaaaaaaaaa|bbbbbbbb| / bb|");
  CHECK(both_texts({"aaaaaaaaaa", "bbbbbbbbbb"}, DocumentSplit::file, 0.4) == "aaaaaaaaaa| / bbbbbbbbbb|");
  CHECK(both_texts({"aaa", "b"}, DocumentSplit::file, 0.5) == "aaa| / b|");
  CHECK(both_texts({"aaa", "b"}, DocumentSplit::file, 0.75) == "a| / aa|b|");
}

TEST_CASE("prepare: reports documents, tokens and bytes of both shards") {
  const Preparation preparation({"aaa\nbbb\nccc\nddd\n"}, DocumentSplit::line, 0.25);
  const PrepareReport report = prepare(preparation.options);
  CHECK(report.train.n_documents == 3);
  CHECK(report.train.n_tokens == 12);
  CHECK(report.train.n_text_bytes == 9);
  CHECK(report.validation->n_documents == 1);
  CHECK(report.validation->n_tokens == 4);
  CHECK(report.validation->n_text_bytes == 3);
  CHECK(list_directory(preparation.options.out) == std::vector<std::string>{"train.bin", "validation.bin"});
}

TEST_CASE("prepare: random text loses nothing and keeps its order") {
  RandomStream random(1, "text");
  for (int round = 0; round < 50; ++round) {
    std::string text = "x";
    const uint64_t size = 20 + random.below(300);
    while (text.size() < size) text += "ab \n\n"[random.below(5)];
    const auto split = static_cast<DocumentSplit>(random.below(3));
    const double fraction = random.uniform(0.1, 0.9);
    const std::string whole = train_text({text}, split);
    const Preparation parts({text}, split, fraction);
    const PrepareReport report = prepare(parts.options);
    // One more '|' where the cut went through a document.
    const std::string train = parts.train();
    std::string joined = train + parts.validation();
    if (joined != whole) joined.erase(train.size() - 1, 1);
    CHECK(joined == whole);
    const double n_held_out = static_cast<double>(report.validation->n_text_bytes);
    const double n_bytes = n_held_out + static_cast<double>(report.train.n_text_bytes);
    CHECK(std::abs(n_held_out - fraction * n_bytes) <= 0.5 * fraction * n_bytes + 1);
  }
}

TEST_CASE("prepare: a document longer than its buffers is written whole") {
  std::string text;
  while (text.size() < (3u << 20) + 5) text += std::to_string(text.size());
  CHECK(train_text({text}, DocumentSplit::file) == text + "|");
}

TEST_CASE("prepare: says what is wrong with its input") {
  const Preparation good({"some text"});
  PrepareOptions options = good.options;
  const Path missing = good.folder.path() / "missing.txt";

  options.files = {good.options.files.front(), missing};
  CHECK_THROWS_WITH(prepare(options), ContainsSubstring(missing.string() + ": cannot open: No such file"));
  options.files = {good.folder.path()};
  CHECK_THROWS_WITH(prepare(options), ContainsSubstring("it is a folder; give a file"));
  options.files = {};
  CHECK_THROWS_WITH(prepare(options), ContainsSubstring("no text was given"));
  CHECK(!exists(options.out));

  for (const double fraction : {-0.1, 1.0, 2.0, std::numeric_limits<double>::quiet_NaN()}) {
    options = good.options;
    options.validation_fraction = fraction;
    CHECK_THROWS_WITH(prepare(options), ContainsSubstring("it must be at least 0 and below 1"));
  }
  options.validation_fraction = 0.05;
  CHECK_THROWS_WITH(prepare(options), ContainsSubstring("a text of 9 bytes cannot be divided"));
  options = good.options;
  options.out = good.options.files.front();
  CHECK_THROWS_AS(prepare(options), Error);
  options.out = "/proc/headwater";
  CHECK_THROWS_AS(prepare(options), Error);
}

TEST_CASE("prepare: an empty text is refused") {
  const Preparation empty({""});
  CHECK_THROWS_WITH(prepare(empty.options), ContainsSubstring("0: there is no text"));
  const Preparation blank({"\n \n", "\t"}, DocumentSplit::line);
  CHECK_THROWS_WITH(prepare(blank.options), ContainsSubstring("there is no text, nor in the files after it"));
}

TEST_CASE("prepare: does not leave another text's validation.bin beside a new train.bin") {
  Preparation preparation({"0123456789"}, DocumentSplit::file, 0.5);
  prepare(preparation.options);
  preparation.options.validation_fraction = 0;
  CHECK_THROWS_WITH(prepare(preparation.options), ContainsSubstring("is from an earlier prepare"));
}

TEST_CASE("prepare: a disk that fills up at any call is a machine error and leaves no half shard") {
  const Preparation preparation({"0123456789"}, DocumentSplit::file, 0.5);
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.failing_call = n, .error_number = ENOSPC});
    {
      const FileSystemOverride override(faulty);
      try {
        prepare(preparation.options);
      } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::machine);
      }
    }
    if (exists(preparation.options.out)) {
      for (const std::string& name : list_directory(preparation.options.out)) {
        CHECK((name == "train.bin" || name == "validation.bin"));
        text_of(preparation.options.out / name);
      }
    }
    if (!faulty.has_failed()) break;
    REQUIRE(n < 200);
  }
  CHECK(preparation.train() == "01234|");
  CHECK(preparation.validation() == "56789|");
}

TEST_CASE("parse_document_split: knows its three names") {
  CHECK(parse_document_split("file") == DocumentSplit::file);
  CHECK(parse_document_split("blank_line") == DocumentSplit::blank_line);
  CHECK(parse_document_split("line") == DocumentSplit::line);
  CHECK_THROWS_WITH(parse_document_split("lines"), ContainsSubstring("known: file, blank_line, line"));
}

TEST_CASE("prepare: real text is divided as asked for and read back") {
  const std::optional<Path> shakespeare = find_test_data("tinyshakespeare.txt");
  if (!shakespeare) return;
  const std::string text = read_text_file(*shakespeare, 1 << 24);
  Preparation preparation({});
  preparation.options.files = {*shakespeare};
  preparation.options.validation_fraction = 0.1;
  const PrepareReport report = prepare(preparation.options);
  CHECK(report.train.n_tokens + report.validation->n_tokens == static_cast<int64_t>(text.size()) + 2);
  CHECK(report.validation->n_text_bytes == std::llround(0.1 * static_cast<double>(text.size())));
  const auto shard = TokenShard::open(preparation.options.out / "train.bin");
  std::vector<int32_t> tokens(static_cast<size_t>(shard->n_tokens()));
  shard->copy(0, shard->n_tokens(), tokens.data());
  CHECK(ByteTokenizer::decode(tokens) == text.substr(0, tokens.size() - 1));
}

}  // namespace
}  // namespace headwater
