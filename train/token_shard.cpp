#include "train/token_shard.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string>

#include "core/error.h"

namespace headwater {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are little-endian and are used as mapped");

constexpr char magic[] = {'H', 'W', 'T', 'O', 'K', 'E', 'N', 'S'};
constexpr uint32_t format_version = 1;
constexpr uint64_t max_vocab_size_u16 = 65536;
/// Tokens are handed out as int32.
constexpr uint64_t max_vocab_size = uint64_t{1} << 31;

/// The first bytes of a shard, as they stand in the file.
struct Header {
  char magic[8];
  uint32_t version;
  uint32_t bytes_per_token;
  uint64_t n_tokens;
  uint64_t n_documents;
  uint64_t n_text_bytes;
  uint64_t vocab_size;
  uint64_t tokenizer_hash;
  uint64_t content_hash;
  uint64_t reserved[7];
  uint64_t header_hash;  ///< of all bytes before it
};
static_assert(sizeof(Header) == 128);

/// The first bytes of llm.c's shards: 256 int32.
struct LlmCHeader {
  int32_t magic;
  int32_t version;
  int32_t n_tokens;
  int32_t reserved[253];
};
static_assert(sizeof(LlmCHeader) == 1024);
constexpr int32_t llm_c_magic = 20240520;
constexpr int64_t gpt2_vocab_size = 50257;     // version 1
constexpr int64_t llama3_vocab_size = 128256;  // version 7

constexpr const char* documents_out_of_order =
    "the beginnings of its documents are out of order; copy or prepare it again";

/// What documents there are in a file that does not say: one.
constexpr uint64_t one_document_start[] = {0};

uint64_t hash_of_header(const Header& header) {
  return hash_bytes(&header, offsetof(Header, header_hash));
}

uint32_t bytes_per_token_for(uint64_t vocab_size) {
  return vocab_size <= max_vocab_size_u16 ? 2 : 4;
}

int64_t checked_vocab_size(const Path& path, int64_t vocab_size) {
  require(vocab_size >= 1 && static_cast<uint64_t>(vocab_size) <= max_vocab_size,
          "{}: a vocabulary of {}: it must be from 1 to 2^31", path.string(), vocab_size);
  return vocab_size;
}

/// Zeros after the tokens, so that the 64-bit numbers behind them are aligned.
uint64_t padding_size(uint64_t token_bytes) {
  return (8 - token_bytes % 8) % 8;
}

Header make_header(const ShardInfo& info) {
  Header header{};
  std::memcpy(header.magic, magic, sizeof(magic));
  header.version = format_version;
  header.bytes_per_token = bytes_per_token_for(static_cast<uint64_t>(info.vocab_size));
  header.n_tokens = static_cast<uint64_t>(info.n_tokens);
  header.n_documents = static_cast<uint64_t>(info.n_documents);
  header.n_text_bytes = static_cast<uint64_t>(info.n_text_bytes);
  header.vocab_size = static_cast<uint64_t>(info.vocab_size);
  header.tokenizer_hash = info.tokenizer_hash;
  header.content_hash = info.content_hash;
  header.header_hash = hash_of_header(header);
  return header;
}

/// Calls again while a signal interrupts the call; a failure names `path`.
template <class Call>
ssize_t must_succeed(const char* action, const Path& path, const Call& call) {
  while (true) {
    const ssize_t result = call();
    if (result >= 0) return result;
    if (errno != EINTR) throw_file_error(action, path, errno);
  }
}

/// Writes over the beginning of an existing file and syncs it; what follows stays. Our header comes last,
/// since it counts and hashes what was streamed before it.
void overwrite_beginning(const Path& path, const void* bytes, size_t size) {
  FileSystem& files = file_system();
  const int file =
      static_cast<int>(must_succeed("open", path, [&] { return files.open(path, O_WRONLY, 0); }));
  const std::shared_ptr<void> closed_at_exit(nullptr, [&](void*) { files.close(file); });
  const char* begin = static_cast<const char*>(bytes);
  while (size > 0) {
    const ssize_t n_written = must_succeed("write", path, [&] { return files.write(file, begin, size); });
    begin += n_written;
    size -= static_cast<size_t>(n_written);
  }
  must_succeed("sync to disk", path, [&] { return files.fsync(file); });
}

/// The hash keeps accidents out; these bounds keep a made-up header from overflowing the sums of sizes.
bool is_sound(const Header& header) {
  constexpr uint64_t max_tokens = uint64_t{1} << 56;
  return header.vocab_size >= 1 && header.vocab_size <= max_vocab_size && header.n_tokens <= max_tokens &&
         header.n_text_bytes <= max_tokens && header.n_documents <= header.n_tokens &&
         (header.n_documents > 0 || header.n_tokens == 0) &&
         header.bytes_per_token == bytes_per_token_for(header.vocab_size);
}

ShardInfo info_from(const Header& header) {
  return {.n_tokens = static_cast<int64_t>(header.n_tokens),
          .n_documents = static_cast<int64_t>(header.n_documents),
          .n_text_bytes = static_cast<int64_t>(header.n_text_bytes),
          .vocab_size = static_cast<int64_t>(header.vocab_size),
          .tokenizer_hash = header.tokenizer_hash,
          .content_hash = header.content_hash};
}

/// Copies `count` stored tokens to int32 and returns the largest, 0 if there are none.
template <class Stored>
int64_t widen(const unsigned char* stored, int64_t count, int32_t* out) {
  const Stored* tokens = reinterpret_cast<const Stored*>(stored);
  Stored largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, tokens[i]);
    out[i] = static_cast<int32_t>(tokens[i]);
  }
  return largest;
}

template <class T>
T read_as(const unsigned char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

}  // namespace

std::shared_ptr<const TokenShard> TokenShard::open(const Path& path, ShardFormat format) {
  require(exists(path), "{}: there is no such token shard; `headwater prepare` makes one from text",
          path.string());
  std::shared_ptr<TokenShard> shard(new TokenShard(MappedFile::open(path)));
  const MappedFile& file = *shard->file_;
  require(file.size() > 0, "{}: the file is empty; prepare it again", path.string());
  const auto begins_with = [&](const void* bytes, size_t size) {
    return std::memcmp(file.data(), bytes, std::min(size, file.size())) == 0;
  };
  if (format == ShardFormat::bare_u16) {
    shard->read_bare();
  } else if (begins_with(magic, sizeof(magic))) {
    shard->read_headwater_header();
  } else if (begins_with(&llm_c_magic, sizeof(llm_c_magic))) {
    shard->read_llm_c_header();
  } else {
    throw_input_error(
        "{}: is no token shard: it begins neither with HWTOKENS nor as llm.c's shards do; text goes through "
        "`headwater prepare` first",
        path.string());
  }
  require(shard->n_tokens() > 0, "{}: holds no tokens; prepare it again", path.string());
  require(shard->document_starts_[0] == 0, "{}: {}", path.string(), documents_out_of_order);
  return shard;
}

void TokenShard::read_headwater_header() {
  const std::string name = path().string();
  require(file_->size() >= sizeof(Header),
          "{}: is truncated: expected at least {} bytes, found {}; prepare it again", name, sizeof(Header),
          file_->size());
  const Header header = read_as<Header>(file_->data());
  require(header.version == format_version,
          "{}: is a token shard of version {}, this program reads version {}; prepare it again", name,
          header.version, format_version);
  require(header.header_hash == hash_of_header(header),
          "{}: the header is damaged: its hash is {}, it says {}; prepare it again", name,
          hash_text(hash_of_header(header)), hash_text(header.header_hash));
  require(is_sound(header),
          "{}: the header makes no sense: {} tokens of {} bytes, {} documents, vocabulary of {}", name,
          header.n_tokens, header.bytes_per_token, header.n_documents, header.vocab_size);

  const uint64_t token_bytes = header.n_tokens * header.bytes_per_token;
  const uint64_t documents_offset = sizeof(Header) + token_bytes + padding_size(token_bytes);
  require_size_bytes(documents_offset + header.n_documents * sizeof(uint64_t));
  info_ = info_from(header);
  has_content_hash_ = true;
  bytes_per_token_ = static_cast<int>(header.bytes_per_token);
  tokens_ = file_->data() + sizeof(Header);
  document_starts_ = reinterpret_cast<const uint64_t*>(file_->data() + documents_offset);
}

void TokenShard::read_llm_c_header() {
  const std::string name = path().string();
  require(file_->size() >= sizeof(LlmCHeader), "{}: is truncated: expected at least {} bytes, found {}", name,
          sizeof(LlmCHeader), file_->size());
  const LlmCHeader header = read_as<LlmCHeader>(file_->data());
  require(header.version == 1 || header.version == 7,
          "{}: is an llm.c token file of version {}; versions 1 (GPT-2) and 7 (Llama 3) are read", name,
          header.version);
  require(header.n_tokens >= 0, "{}: the header makes no sense: {} tokens", name, header.n_tokens);
  bytes_per_token_ = header.version == 1 ? 2 : 4;
  require_size_bytes(sizeof(LlmCHeader) +
                     static_cast<uint64_t>(header.n_tokens) * static_cast<uint64_t>(bytes_per_token_));
  info_.n_tokens = header.n_tokens;
  info_.vocab_size = header.version == 1 ? gpt2_vocab_size : llama3_vocab_size;
  tokens_ = file_->data() + sizeof(LlmCHeader);
  treat_as_one_document();
}

void TokenShard::read_bare() {
  require(file_->size() % 2 == 0, "{}: has {} bytes, an odd number: these are no bare 16-bit tokens",
          path().string(), file_->size());
  bytes_per_token_ = 2;
  info_.n_tokens = static_cast<int64_t>(file_->size() / 2);
  info_.vocab_size = static_cast<int64_t>(max_vocab_size_u16);
  tokens_ = file_->data();
  treat_as_one_document();
}

void TokenShard::treat_as_one_document() {
  info_.n_documents = 1;
  document_starts_ = one_document_start;
}

void TokenShard::require_size_bytes(uint64_t expected) const {
  require(file_->size() >= expected,
          "{}: is truncated: expected {} bytes, found {}; copy or prepare it again", path().string(),
          expected, file_->size());
  require(file_->size() == expected, "{}: is too long: expected {} bytes, found {}; copy or prepare it again",
          path().string(), expected, file_->size());
}

void TokenShard::verify_contents() const {
  if (has_content_hash_) {
    const uint64_t found = hash_bytes(file_->data() + sizeof(Header), file_->size() - sizeof(Header));
    require(found == info_.content_hash,
            "{}: the contents are damaged: their hash is {}, the header says {}; copy or prepare it again",
            path().string(), hash_text(found), hash_text(info_.content_hash));
  }
  require_tokens_below(info_.vocab_size);
  const uint64_t* end = document_starts_ + info_.n_documents;
  const bool is_increasing = std::adjacent_find(document_starts_, end, std::greater_equal<>()) == end;
  require(is_increasing && end[-1] < static_cast<uint64_t>(info_.n_tokens), "{}: {}", path().string(),
          documents_out_of_order);
}

void TokenShard::require_vocab_size(int64_t vocab_size) const {
  if (vocab_size < info_.vocab_size) require_tokens_below(vocab_size);
}

void TokenShard::require_tokens_below(int64_t vocab_size) const {
  std::vector<int32_t> piece(static_cast<size_t>(std::min<int64_t>(info_.n_tokens, 1 << 16)));
  const int64_t piece_size = static_cast<int64_t>(piece.size());
  for (int64_t begin = 0; begin < info_.n_tokens; begin += piece_size) {
    copy_below(vocab_size, begin, std::min(piece_size, info_.n_tokens - begin), piece.data());
  }
}

int32_t TokenShard::token(int64_t index) const {
  int32_t result;
  copy(index, 1, &result);
  return result;
}

void TokenShard::copy(int64_t begin, int64_t count, int32_t* out) const {
  require(begin >= 0 && count >= 0 && count <= info_.n_tokens - begin,
          "{}: tokens {} to {} were asked for, it has {}", path().string(), begin, begin + count,
          info_.n_tokens);
  copy_below(info_.vocab_size, begin, count, out);
}

void TokenShard::copy_below(int64_t vocab_size, int64_t begin, int64_t count, int32_t* out) const {
  const int64_t largest = bytes_per_token_ == 2 ? widen<uint16_t>(tokens_ + begin * 2, count, out)
                                                : widen<uint32_t>(tokens_ + begin * 4, count, out);
  if (largest < vocab_size) return;
  const auto is_outside = [&](int32_t token) { return static_cast<uint32_t>(token) >= vocab_size; };
  const int64_t where = std::find_if(out, out + count, is_outside) - out;
  throw_input_error(
      "{}: token {} is {}, outside the vocabulary of {}; was it prepared with another tokenizer?",
      path().string(), begin + where, static_cast<uint32_t>(out[where]), vocab_size);
}

int64_t TokenShard::document_of(int64_t index) const {
  require(index >= 0 && index < info_.n_tokens, "{}: token {} was asked for, it has {}", path().string(),
          index, info_.n_tokens);
  const uint64_t* end = document_starts_ + info_.n_documents;
  return std::upper_bound(document_starts_, end, static_cast<uint64_t>(index)) - document_starts_ - 1;
}

int64_t TokenShard::document_start(int64_t document) const {
  require(document >= 0 && document <= info_.n_documents, "{}: document {} was asked for, it has {}",
          path().string(), document, info_.n_documents);
  if (document == info_.n_documents) return info_.n_tokens;
  // Until verify_contents() has run, a damaged file may say anything here.
  return static_cast<int64_t>(std::min(document_starts_[document], static_cast<uint64_t>(info_.n_tokens)));
}

TokenShardWriter::TokenShardWriter(const Path& path, int64_t vocab_size, uint64_t tokenizer_hash)
    : path_(path),
      temporary_path_(fmt::format("{}.tmp-{}", path.string(), ::getpid())),
      info_{.vocab_size = checked_vocab_size(path, vocab_size), .tokenizer_hash = tokenizer_hash},
      file_(temporary_path_) {
  const Header no_header_yet{};
  file_.write(&no_header_yet, sizeof(no_header_yet));
}

TokenShardWriter::~TokenShardWriter() {
  if (!is_finished_) remove_tree_quietly(temporary_path_);
}

void TokenShardWriter::append(std::span<const int32_t> tokens, int64_t n_text_bytes) {
  if (tokens.empty()) return;
  if (at_document_start_) document_starts_.push_back(static_cast<uint64_t>(info_.n_tokens));
  at_document_start_ = false;
  if (bytes_per_token_for(static_cast<uint64_t>(info_.vocab_size)) == 2) {
    write_tokens<uint16_t>(tokens);
  } else {
    write_tokens<uint32_t>(tokens);
  }
  info_.n_tokens += static_cast<int64_t>(tokens.size());
  info_.n_text_bytes += n_text_bytes;
}

template <class Stored>
void TokenShardWriter::write_tokens(std::span<const int32_t> tokens) {
  std::vector<Stored> stored(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    require(tokens[i] >= 0 && tokens[i] < info_.vocab_size, "{}: token {} is outside the vocabulary of {}",
            path_.string(), tokens[i], info_.vocab_size);
    stored[i] = static_cast<Stored>(tokens[i]);
  }
  write_and_hash(stored.data(), stored.size() * sizeof(Stored));
}

void TokenShardWriter::write_and_hash(const void* bytes, size_t size) {
  file_.write(bytes, size);
  hash_.update(bytes, size);
}

ShardInfo TokenShardWriter::finish() {
  require(info_.n_tokens > 0, "{}: there are no tokens to write", path_.string());
  constexpr char zeros[8] = {};
  write_and_hash(zeros, padding_size(file_.size_bytes()));
  write_and_hash(document_starts_.data(), document_starts_.size() * sizeof(uint64_t));
  file_.close();
  info_.n_documents = static_cast<int64_t>(document_starts_.size());
  info_.content_hash = hash_.value();
  const Header header = make_header(info_);
  overwrite_beginning(temporary_path_, &header, sizeof(header));
  rename_path(temporary_path_, path_);
  is_finished_ = true;
  sync_directory(path_.has_parent_path() ? path_.parent_path() : Path("."));
  return info_;
}

}  // namespace headwater
