#include "train/tokenizer.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/hash.h"

namespace headwater {
namespace {

bool is_continuation(unsigned char byte) {
  return (byte & 0xc0) == 0x80;
}

/// How many bytes the UTF-8 character has that begins with `lead`; 1 for what cannot begin one.
size_t character_size(unsigned char lead) {
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 1;
}

/// How many bytes at the end of `text` begin a UTF-8 character that more bytes may complete: 0 to 3.
size_t incomplete_tail_size(std::string_view text) {
  for (size_t size = 1; size <= std::min<size_t>(3, text.size()); ++size) {
    const unsigned char byte = static_cast<unsigned char>(text[text.size() - size]);
    if (!is_continuation(byte)) return character_size(byte) > size ? size : 0;
  }
  return 0;
}

void append_decoded(int32_t token, std::string& text) {
  require(token >= 0 && token < ByteTokenizer::vocab_size,
          "token {} is outside the byte vocabulary, 0 to {}; was it made by another tokenizer?", token,
          ByteTokenizer::vocab_size - 1);
  if (token != ByteTokenizer::end_of_document) text.push_back(static_cast<char>(token));
}

}  // namespace

std::vector<int32_t> ByteTokenizer::encode(std::string_view text) {
  std::vector<int32_t> tokens(text.size());
  std::transform(text.begin(), text.end(), tokens.begin(),
                 [](char byte) { return static_cast<uint8_t>(byte); });
  return tokens;
}

std::string ByteTokenizer::decode(std::span<const int32_t> tokens) {
  std::string text;
  text.reserve(tokens.size());
  for (const int32_t token : tokens) append_decoded(token, text);
  return text;
}

std::string ByteTokenizer::json() {
  return R"({"type":"headwater-bytes","version":1,"end_of_document":256})"
         "\n";
}

uint64_t ByteTokenizer::hash() {
  const std::string text = json();
  return hash_bytes(text.data(), text.size());
}

std::string StreamingDecoder::next(int32_t token) {
  append_decoded(token, held_back_);
  const size_t n_ready = held_back_.size() - incomplete_tail_size(held_back_);
  std::string ready = held_back_.substr(0, n_ready);
  held_back_.erase(0, n_ready);
  return ready;
}

std::string StreamingDecoder::finish() {
  return std::exchange(held_back_, {});
}

}  // namespace headwater
