// The byte-level tokenizer: text of any language, or any other bytes, without a vocabulary file.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace headwater {

/// Tokens 0 to 255 are the bytes of the text, 256 ends a document.
class ByteTokenizer {
 public:
  static constexpr int32_t end_of_document = 256;
  static constexpr int64_t vocab_size = 257;

  /// One token a byte; no end of document is added.
  static std::vector<int32_t> encode(std::string_view text);

  /// The bytes of `tokens`, valid UTF-8 or not; the end of a document is no byte. Throws an input error for a
  /// token that is outside the vocabulary.
  static std::string decode(std::span<const int32_t> tokens);

  /// The tokenizer.json of a checkpoint folder.
  static std::string json();

  /// Names the tokenizer inside token shards: the hash of json().
  static uint64_t hash();
};

/// Decodes token by token for a terminal, which would show half a character as rubbish: the last bytes are
/// held back while they are the beginning of a UTF-8 character. Bytes that can never become one pass
/// unchanged.
class StreamingDecoder {
 public:
  /// The bytes that `token` completes, maybe none. Throws as ByteTokenizer::decode does.
  std::string next(int32_t token);
  /// The bytes still held back. The decoder is empty afterwards.
  std::string finish();

 private:
  std::string held_back_;
};

}  // namespace headwater
