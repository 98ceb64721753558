#include "train/token_shard.h"

#include <cerrno>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/random.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

using Documents = std::vector<std::vector<int32_t>>;

ShardInfo write_shard(const Path& path, const Documents& documents, int64_t vocab_size = 257) {
  TokenShardWriter writer(path, vocab_size, 0x1234);
  for (const auto& document : documents) {
    writer.append(document, static_cast<int64_t>(document.size()));
    writer.end_document();
  }
  return writer.finish();
}

std::string bytes_of(const Path& path) {
  return read_text_file(path, 1 << 24);
}

/// Writes `bytes` and returns the text of the error that opening and verifying them gives, or "".
std::string complaint_about(const Path& path, const std::string& bytes,
                            ShardFormat format = ShardFormat::by_magic) {
  write_file_atomically(path, bytes);
  try {
    TokenShard::open(path, format)->verify_contents();
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::input);
    CHECK_THAT(error.what(), ContainsSubstring(path.string()));
    return error.what();
  }
  return "";
}

/// A shard's bytes with the header field at `offset` replaced and the header's hash made to fit.
std::string with_header_field(std::string bytes, size_t offset, uint64_t value, size_t size = 8) {
  std::memcpy(bytes.data() + offset, &value, size);
  const uint64_t hash = hash_bytes(bytes.data(), 120);
  std::memcpy(bytes.data() + 120, &hash, sizeof(hash));
  return bytes;
}

std::string llm_c_file(int32_t version, int32_t n_tokens, const std::string& tokens) {
  std::string bytes(1024, '\0');
  const int32_t header[] = {20240520, version, n_tokens};
  std::memcpy(bytes.data(), header, sizeof(header));
  return bytes + tokens;
}

template <class Stored>
std::string stored_as(const std::vector<Stored>& tokens) {
  return {reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Stored)};
}

std::vector<int32_t> all_tokens(const TokenShard& shard) {
  std::vector<int32_t> tokens(static_cast<size_t>(shard.n_tokens()));
  shard.copy(0, shard.n_tokens(), tokens.data());
  return tokens;
}

TEST_CASE("TokenShard: what was written is read back") {
  TemporaryFolder folder;
  const Path path = folder.path() / "train.bin";
  const ShardInfo written = write_shard(path, {{97, 98, 256}, {256}, {99, 256}});
  const auto shard = TokenShard::open(path);
  shard->verify_contents();
  CHECK(shard->n_tokens() == 6);
  CHECK(shard->n_documents() == 3);
  CHECK(shard->info().n_text_bytes == 6);
  CHECK(shard->info().vocab_size == 257);
  CHECK(shard->info().tokenizer_hash == 0x1234);
  CHECK(shard->info().content_hash == written.content_hash);
  CHECK(all_tokens(*shard) == std::vector<int32_t>{97, 98, 256, 256, 99, 256});
  CHECK(shard->token(4) == 99);
  CHECK(list_directory(folder.path()) == std::vector<std::string>{"train.bin"});
}

TEST_CASE("TokenShard: documents are found by token") {
  TemporaryFolder folder;
  write_shard(folder.path() / "train.bin", {{97, 98, 256}, {256}, {99, 256}});
  const auto shard = TokenShard::open(folder.path() / "train.bin");
  const std::vector<int64_t> documents = {0, 0, 0, 1, 2, 2};
  const std::vector<int64_t> next_starts = {3, 3, 3, 4, 6, 6};
  for (int64_t index = 0; index < 6; ++index) {
    CHECK(shard->document_of(index) == documents[static_cast<size_t>(index)]);
    CHECK(shard->next_document_start(index) == next_starts[static_cast<size_t>(index)]);
  }
  CHECK(shard->document_start(2) == 4);
  CHECK(shard->document_start(3) == 6);
  CHECK_THROWS_WITH(shard->document_of(6), ContainsSubstring("token 6 was asked for, it has 6"));
  CHECK_THROWS_WITH(shard->document_start(4), ContainsSubstring("document 4 was asked for, it has 3"));
}

TEST_CASE("TokenShard: vocabularies above 65536 are stored in 32 bits") {
  TemporaryFolder folder;
  const std::vector<int32_t> tokens = {0, 65535, 65536, 1 << 20};
  write_shard(folder.path() / "large.bin", {tokens}, (1 << 20) + 1);
  write_shard(folder.path() / "small.bin", {{0, 65535}}, 65536);
  CHECK(all_tokens(*TokenShard::open(folder.path() / "large.bin")) == tokens);
  CHECK(bytes_of(folder.path() / "large.bin").size() == 128 + 4 * 4 + 8);
  CHECK(all_tokens(*TokenShard::open(folder.path() / "small.bin")) == std::vector<int32_t>{0, 65535});
  CHECK(bytes_of(folder.path() / "small.bin").size() == 128 + 8 + 8);
}

TEST_CASE("TokenShard: random documents equal the vector they came from") {
  TemporaryFolder folder;
  RandomStream random(1, "documents");
  for (int round = 0; round < 20; ++round) {
    TokenShardWriter writer(folder.path() / "random.bin", 257, ByteTokenizer::hash());
    std::vector<int32_t> expected;
    std::vector<int64_t> document_of;
    const int64_t n_documents = 1 + static_cast<int64_t>(random.below(20));
    for (int64_t document = 0; document < n_documents; ++document) {
      for (uint64_t piece = 0; piece <= random.below(3); ++piece) {
        std::vector<int32_t> tokens(1 + random.below(40));
        for (int32_t& token : tokens) token = static_cast<int32_t>(random.below(257));
        writer.append(tokens, 1);
        expected.insert(expected.end(), tokens.begin(), tokens.end());
      }
      writer.end_document();
      writer.end_document();  // a document without tokens is none
      document_of.resize(expected.size(), document);
    }
    writer.finish();
    const auto shard = TokenShard::open(folder.path() / "random.bin");
    shard->verify_contents();
    CHECK(all_tokens(*shard) == expected);
    CHECK(shard->n_documents() == n_documents);
    for (int64_t index = 0; index < shard->n_tokens(); ++index) {
      CHECK(shard->document_of(index) == document_of[static_cast<size_t>(index)]);
    }
  }
}

TEST_CASE("TokenShard: copy and token refuse what lies outside") {
  TemporaryFolder folder;
  write_shard(folder.path() / "train.bin", {{1, 2, 3}});
  const auto shard = TokenShard::open(folder.path() / "train.bin");
  int32_t out[4];
  CHECK_THROWS_WITH(shard->copy(1, 3, out), ContainsSubstring("tokens 1 to 4 were asked for, it has 3"));
  CHECK_THROWS_AS(shard->copy(-1, 1, out), Error);
  CHECK_THROWS_AS(shard->copy(0, -1, out), Error);
  CHECK_THROWS_AS(shard->token(3), Error);
  shard->copy(3, 0, out);
}

TEST_CASE("TokenShard: a missing file names `headwater prepare`") {
  TemporaryFolder folder;
  CHECK_THROWS_WITH(TokenShard::open(folder.path() / "train.bin"),
                    ContainsSubstring((folder.path() / "train.bin").string() +
                                      ": there is no such token shard; `headwater prepare` makes one"));
  CHECK_THROWS_WITH(TokenShard::open(folder.path()), ContainsSubstring("folder"));
}

TEST_CASE("TokenShard: truncation at every byte is refused") {
  TemporaryFolder folder;
  write_shard(folder.path() / "whole.bin", {{1, 2, 3}, {4, 256}});
  const std::string whole = bytes_of(folder.path() / "whole.bin");
  const Path path = folder.path() / "train.bin";
  CHECK(complaint_about(path, whole) == "");
  CHECK_THAT(complaint_about(path, ""), ContainsSubstring("the file is empty"));
  for (size_t size = 1; size < 128; ++size) {
    CHECK_THAT(complaint_about(path, whole.substr(0, size)),
               ContainsSubstring(fmt::format("is truncated: expected at least 128 bytes, found {}", size)));
  }
  for (size_t size = 128; size < whole.size(); ++size) {
    CHECK_THAT(
        complaint_about(path, whole.substr(0, size)),
        ContainsSubstring(fmt::format("is truncated: expected {} bytes, found {}", whole.size(), size)));
  }
  CHECK_THAT(complaint_about(path, whole + "x"), ContainsSubstring("is too long: expected"));
}

TEST_CASE("TokenShard: every flipped bit is found") {
  TemporaryFolder folder;
  write_shard(folder.path() / "whole.bin", {{1, 2, 3}, {4, 256}});
  const std::string whole = bytes_of(folder.path() / "whole.bin");
  for (size_t bit = 0; bit < whole.size() * 8; ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    const std::string complaint = complaint_about(folder.path() / "train.bin", damaged);
    INFO("bit " << bit);
    if (bit < 8 * 8) {
      CHECK_THAT(complaint, ContainsSubstring("is no token shard"));
    } else if (bit < 12 * 8) {
      CHECK_THAT(complaint, ContainsSubstring("is a token shard of version"));
    } else if (bit < 128 * 8) {
      CHECK_THAT(complaint, ContainsSubstring("the header is damaged: its hash is"));
    } else if (bit / 64 == (whole.size() - 16) / 8) {
      CHECK_THAT(complaint, ContainsSubstring("the beginnings of its documents are out of order"));
    } else {
      CHECK_THAT(complaint, ContainsSubstring("the contents are damaged: their hash is"));
    }
  }
}

TEST_CASE("TokenShard: headers that were made up are refused") {
  TemporaryFolder folder;
  write_shard(folder.path() / "whole.bin", {{1, 2, 3}, {4, 256}});
  const std::string whole = bytes_of(folder.path() / "whole.bin");
  const Path path = folder.path() / "train.bin";
  constexpr size_t bytes_per_token = 12, n_tokens = 16, n_documents = 24, vocab_size = 40, content_hash = 56;
  const auto complaint = [&](size_t field, uint64_t value) {
    return complaint_about(path, with_header_field(whole, field, value, field == bytes_per_token ? 4 : 8));
  };
  for (const uint64_t huge : {~uint64_t{0}, uint64_t{1} << 63, (uint64_t{1} << 56) + 1}) {
    CHECK_THAT(complaint(n_tokens, huge), ContainsSubstring("the header makes no sense"));
    CHECK_THAT(complaint(n_documents, huge), ContainsSubstring("the header makes no sense"));
    CHECK_THAT(complaint(vocab_size, huge), ContainsSubstring("the header makes no sense"));
  }
  CHECK_THAT(complaint(n_tokens, uint64_t{1} << 56), ContainsSubstring("is truncated"));
  CHECK_THAT(complaint(n_documents, 0), ContainsSubstring("the header makes no sense"));
  CHECK_THAT(complaint(bytes_per_token, 4), ContainsSubstring("the header makes no sense"));
  CHECK_THAT(complaint(vocab_size, 0), ContainsSubstring("the header makes no sense"));
  CHECK_THAT(complaint(vocab_size, 256), ContainsSubstring("token 4 is 256, outside the vocabulary of 256"));
  CHECK_THAT(complaint(content_hash, 0), ContainsSubstring("the contents are damaged"));

  const std::string no_tokens =
      with_header_field(with_header_field(whole.substr(0, 128), n_tokens, 0), n_documents, 0);
  CHECK_THAT(complaint_about(path, no_tokens), ContainsSubstring("holds no tokens"));
}

TEST_CASE("TokenShard: documents out of order are refused") {
  TemporaryFolder folder;
  write_shard(folder.path() / "whole.bin", {{1, 2, 3}, {4, 5}, {6}});
  const std::string whole = bytes_of(folder.path() / "whole.bin");
  const size_t starts_offset = whole.size() - 3 * 8;
  const auto complaint = [&](const std::vector<uint64_t>& starts) {
    const std::string bytes = whole.substr(0, starts_offset) + stored_as(starts);
    const uint64_t hash = hash_bytes(bytes.data() + 128, bytes.size() - 128);
    return complaint_about(folder.path() / "train.bin", with_header_field(bytes, 56, hash));
  };
  CHECK(complaint({0, 3, 5}) == "");
  CHECK_THAT(complaint({1, 3, 5}), ContainsSubstring("the beginnings of its documents are out of order"));
  CHECK_THAT(complaint({0, 3, 3}), ContainsSubstring("out of order"));
  CHECK_THAT(complaint({0, 5, 3}), ContainsSubstring("out of order"));
  CHECK_THAT(complaint({0, 3, 6}), ContainsSubstring("out of order"));
}

TEST_CASE("TokenShard: another kind of file is refused") {
  TemporaryFolder folder;
  CHECK_THAT(complaint_about(folder.path() / "text.bin", "First Citizen: before we proceed"),
             ContainsSubstring("is no token shard"));
}

TEST_CASE("TokenShard: a model with a smaller vocabulary is refused at the first token outside") {
  TemporaryFolder folder;
  write_shard(folder.path() / "train.bin", {{1, 2, 99, 3}});
  const auto shard = TokenShard::open(folder.path() / "train.bin");
  shard->require_vocab_size(257);
  shard->require_vocab_size(100);  // the shard's vocabulary is larger, its tokens are not
  CHECK_THROWS_WITH(shard->require_vocab_size(99),
                    ContainsSubstring("token 2 is 99, outside the vocabulary of 99"));
}

TEST_CASE("TokenShard: llm.c's files are read") {
  TemporaryFolder folder;
  const Path path = folder.path() / "llm_c.bin";
  write_file_atomically(path, llm_c_file(1, 3, stored_as<uint16_t>({50256, 0, 7})));
  auto shard = TokenShard::open(path);
  shard->verify_contents();
  CHECK(all_tokens(*shard) == std::vector<int32_t>{50256, 0, 7});
  CHECK(shard->info().vocab_size == 50257);
  CHECK(shard->n_documents() == 1);
  CHECK(shard->next_document_start(1) == 3);

  write_file_atomically(path, llm_c_file(7, 2, stored_as<uint32_t>({128000, 5})));
  shard = TokenShard::open(path);
  CHECK(all_tokens(*shard) == std::vector<int32_t>{128000, 5});
  CHECK(shard->info().vocab_size == 128256);

  CHECK_THAT(complaint_about(path, llm_c_file(2, 1, "..")),
             ContainsSubstring("is an llm.c token file of version 2"));
  CHECK_THAT(complaint_about(path, llm_c_file(1, 3, "....")),
             ContainsSubstring("is truncated: expected 1030 bytes, found 1028"));
  CHECK_THAT(complaint_about(path, llm_c_file(1, 1, "....")), ContainsSubstring("is too long"));
  CHECK_THAT(complaint_about(path, llm_c_file(1, 0, "")), ContainsSubstring("holds no tokens"));
  CHECK_THAT(complaint_about(path, llm_c_file(1, -1, "")), ContainsSubstring("makes no sense"));
  CHECK_THAT(complaint_about(path, llm_c_file(1, 1, "").substr(0, 100)), ContainsSubstring("is truncated"));
  CHECK_THAT(complaint_about(path, llm_c_file(1, 1, stored_as<uint16_t>({50257}))),
             ContainsSubstring("token 0 is 50257, outside the vocabulary of 50257"));
  CHECK_THAT(complaint_about(path, llm_c_file(7, 1, stored_as<uint32_t>({4000000000u}))),
             ContainsSubstring("token 0 is 4000000000"));
}

TEST_CASE("TokenShard: bare 16-bit tokens are read when asked for") {
  TemporaryFolder folder;
  const Path path = folder.path() / "bare.bin";
  write_file_atomically(path, stored_as<uint16_t>({50256, 65535, 7}));
  const auto shard = TokenShard::open(path, ShardFormat::bare_u16);
  shard->verify_contents();
  CHECK(all_tokens(*shard) == std::vector<int32_t>{50256, 65535, 7});
  CHECK(shard->n_documents() == 1);
  CHECK_THROWS_WITH(shard->require_vocab_size(50257), ContainsSubstring("token 1 is 65535"));
  CHECK_THROWS_WITH(TokenShard::open(path), ContainsSubstring("is no token shard"));
  CHECK_THAT(complaint_about(path, "odd", ShardFormat::bare_u16), ContainsSubstring("an odd number"));
}

TEST_CASE("TokenShardWriter: refuses tokens and vocabularies that do not fit, and leaves nothing behind") {
  TemporaryFolder folder;
  const Path path = folder.path() / "train.bin";
  CHECK_THROWS_WITH(write_shard(path, {{1, 257}}),
                    ContainsSubstring("token 257 is outside the vocabulary of 257"));
  CHECK_THROWS_WITH(write_shard(path, {{-1}}), ContainsSubstring("token -1 is outside"));
  CHECK_THROWS_WITH(write_shard(path, {}), ContainsSubstring("there are no tokens to write"));
  CHECK_THROWS_WITH(write_shard(path, {{1}}, 0), ContainsSubstring("it must be from 1 to 2^31"));
  CHECK_THROWS_AS(write_shard(path, {{1}}, (int64_t{1} << 31) + 1), Error);
  CHECK_THROWS_AS(write_shard(folder.path() / "missing" / "train.bin", {{1}}), Error);
  CHECK(list_directory(folder.path()).empty());
}

/// Writes a shard over an old one while `faults` strike, and checks that one of the two stands, whole.
/// Returns whether a fault struck.
bool survives(const Faults& faults) {
  TemporaryFolder folder;
  const Path path = folder.path() / "train.bin";
  write_shard(path, {{1, 2, 3}});
  FaultyFileSystem faulty(faults);
  {
    const FileSystemOverride override(faulty);
    try {
      write_shard(path, {{4, 5, 6, 7}});
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::machine);
      CHECK_THAT(error.what(), ContainsSubstring(folder.path().string()));
    } catch (const SimulatedStop&) {
    }
  }
  const auto shard = TokenShard::open(path);
  shard->verify_contents();
  CHECK((shard->n_tokens() == 3 || shard->n_tokens() == 4));
  // Only a process that stopped cannot clean up.
  if (!faulty.has_stopped()) CHECK(list_directory(folder.path()) == std::vector<std::string>{"train.bin"});
  return faulty.has_failed() || faulty.has_stopped();
}

TEST_CASE("TokenShardWriter: whichever call fails, the old shard or the new one stands") {
  for (const int error_number : {ENOSPC, EIO}) {
    int n = 1;
    while (survives({.failing_call = n, .error_number = error_number})) ++n;
    CHECK(n > 8);
  }
}

TEST_CASE("TokenShardWriter: interrupted and short writes are carried on") {
  for (int n = 1; survives({.failing_call = n, .error_number = EINTR, .longest_write = 7}); ++n) {
    REQUIRE(n < 200);
  }
}

TEST_CASE("TokenShardWriter: wherever the process stops, the old shard or the new one stands") {
  for (int n = 1; survives({.stopping_call = n}); ++n) REQUIRE(n < 200);
  for (int64_t n_bytes = 0; survives({.stopping_byte = n_bytes}); ++n_bytes) REQUIRE(n_bytes < 1000);
}

}  // namespace
}  // namespace headwater
