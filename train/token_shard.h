// Token shards: text as token numbers in a file, memory-mapped, so that a corpus may be larger than memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/files.h"
#include "core/hash.h"

namespace headwater {

/// What a shard says about itself.
struct ShardInfo {
  int64_t n_tokens = 0;
  int64_t n_documents = 0;
  int64_t n_text_bytes = 0;     ///< bytes of text that the tokens stand for, for bits per byte; 0 if unknown
  int64_t vocab_size = 0;       ///< every token is below it
  uint64_t tokenizer_hash = 0;  ///< ByteTokenizer::hash() and the like; 0 if unknown
  uint64_t content_hash = 0;    ///< XXH3 of all that follows the header; 0 if unknown
};

enum class ShardFormat {
  by_magic,  ///< Headwater's or llm.c's, told apart by their first bytes
  bare_u16,  ///< nanoGPT's: 16-bit tokens and nothing else; nothing in such a file shows what it is
};

/// A shard being read. Thread-safe. A Headwater shard is
///
///     128 bytes    header: magic "HWTOKENS", version, bytes per token, ShardInfo, hash of the header itself
///     n_tokens     tokens, u16 where vocab_size <= 65536, else u32; zeros up to a multiple of 8 bytes
///     n_documents  u64 each: the index of the document's first token, increasing, the first is 0
///
/// all little-endian. llm.c's files (256 int32 of header, magic 20240520, version 1: GPT-2's tokens as u16,
/// version 7: Llama 3's as u32) and bare files are one long document.
class TokenShard {
 public:
  /// Checks the header and the size of the file, not its contents. Throws an input error that names the file
  /// and what is wrong: missing, empty, truncated (bytes expected and found), of another kind, damaged, from
  /// a later version, without tokens.
  static std::shared_ptr<const TokenShard> open(const Path& path, ShardFormat format = ShardFormat::by_magic);

  const Path& path() const { return file_->path(); }
  const ShardInfo& info() const { return info_; }
  int64_t n_tokens() const { return info_.n_tokens; }
  int64_t n_documents() const { return info_.n_documents; }

  /// Reads the whole file. Throws an input error if its hash is not the header's, a token is not below
  /// vocab_size, or the documents' beginnings are out of order.
  void verify_contents() const;
  /// Throws an input error unless every token is below a model's `vocab_size`. Reads the tokens only where
  /// the shard's own vocabulary is larger.
  void require_vocab_size(int64_t vocab_size) const;

  int32_t token(int64_t index) const;
  /// Copies tokens [begin, begin + count). Throws an input error if they are not all in the shard, or one of
  /// them is not below vocab_size.
  void copy(int64_t begin, int64_t count, int32_t* out) const;

  /// The document that holds token `index`, 0 <= index < n_tokens.
  int64_t document_of(int64_t index) const;
  /// Index of the first token of `document`; n_tokens for document == n_documents.
  int64_t document_start(int64_t document) const;
  /// The first beginning of a document after `index`, or n_tokens.
  int64_t next_document_start(int64_t index) const { return document_start(document_of(index) + 1); }

 private:
  explicit TokenShard(std::shared_ptr<const MappedFile> file) : file_(std::move(file)) {}

  void read_headwater_header();
  void read_llm_c_header();
  void read_bare();
  void treat_as_one_document();
  void require_size_bytes(uint64_t expected) const;
  void require_tokens_below(int64_t vocab_size) const;
  void copy_below(int64_t vocab_size, int64_t begin, int64_t count, int32_t* out) const;

  std::shared_ptr<const MappedFile> file_;
  ShardInfo info_;
  bool has_content_hash_ = false;  // llm.c's and bare files have none
  int bytes_per_token_ = 0;
  const unsigned char* tokens_ = nullptr;
  const uint64_t* document_starts_ = nullptr;
};

/// A Headwater shard being written. The file appears under its name, whole, when finish() returns; a writer
/// that is destroyed before leaves nothing behind. Tokens stream to disk, the documents' beginnings stay in
/// memory.
class TokenShardWriter {
 public:
  /// Throws an input error unless 1 <= vocab_size <= 2^31, and what OutputFile throws.
  TokenShardWriter(const Path& path, int64_t vocab_size, uint64_t tokenizer_hash);
  ~TokenShardWriter();
  TokenShardWriter(const TokenShardWriter&) = delete;
  TokenShardWriter& operator=(const TokenShardWriter&) = delete;

  /// Adds tokens, which stand for `n_text_bytes` of text, to the present document. Throws an input error for
  /// a token outside the vocabulary.
  void append(std::span<const int32_t> tokens, int64_t n_text_bytes);
  /// The next token begins another document. A document without tokens is none.
  void end_document() { at_document_start_ = true; }
  /// Writes the rest and gives the file its name. Throws an input error if there are no tokens.
  ShardInfo finish();

 private:
  template <class Stored>
  void write_tokens(std::span<const int32_t> tokens);
  void write_and_hash(const void* bytes, size_t size);

  Path path_;
  Path temporary_path_;
  ShardInfo info_;
  OutputFile file_;
  StreamingHash hash_;
  std::vector<uint64_t> document_starts_;
  bool at_document_start_ = true;
  bool is_finished_ = false;
};

}  // namespace headwater
