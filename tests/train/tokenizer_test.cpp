#include "train/tokenizer.h"

#include "core/error.h"
#include "tests/catch.h"

namespace headwater {
namespace {

std::string all_bytes() {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(static_cast<char>(byte));
  return bytes;
}

/// What a StreamingDecoder shows after each byte of `text`, pieces separated by '|', and what finish() adds.
std::string shown(const std::string& text) {
  StreamingDecoder decoder;
  std::string pieces;
  for (const int32_t token : ByteTokenizer::encode(text)) pieces += decoder.next(token) + "|";
  return pieces + decoder.finish();
}

TEST_CASE("ByteTokenizer: a token is a byte") {
  CHECK(ByteTokenizer::encode("a\xff").at(0) == 97);
  CHECK(ByteTokenizer::encode("a\xff").at(1) == 255);
  CHECK(ByteTokenizer::encode("").empty());
}

TEST_CASE("ByteTokenizer: decode undoes encode, for bytes that are not UTF-8 too") {
  CHECK(ByteTokenizer::decode(ByteTokenizer::encode(all_bytes())) == all_bytes());
  CHECK(ByteTokenizer::decode(ByteTokenizer::encode("na\u00efve \u4f60\u597d")) == "na\u00efve \u4f60\u597d");
}

TEST_CASE("ByteTokenizer: the end of a document decodes to nothing") {
  CHECK(ByteTokenizer::decode(std::vector<int32_t>{97, 256, 98, 256}) == "ab");
}

TEST_CASE("ByteTokenizer: tokens outside the vocabulary are named") {
  CHECK_THROWS_WITH(ByteTokenizer::decode(std::vector<int32_t>{97, 257}),
                    ContainsSubstring("token 257 is outside the byte vocabulary, 0 to 256"));
  CHECK_THROWS_AS(ByteTokenizer::decode(std::vector<int32_t>{-1}), Error);
  CHECK_THROWS_AS(StreamingDecoder().next(50256), Error);
}

TEST_CASE("ByteTokenizer: json and hash never change, shards and checkpoints carry them") {
  CHECK(ByteTokenizer::json() == "{\"type\":\"headwater-bytes\",\"version\":1,\"end_of_document\":256}\n");
  CHECK(ByteTokenizer::hash() == 0xf38808eceaabb544u);
}

TEST_CASE("StreamingDecoder: characters appear whole") {
  CHECK(shown("ab") == "a|b|");
  CHECK(shown("\u00ef!") == "|\u00ef|!|");
  CHECK(shown("\u4f60") == "||\u4f60|");
  CHECK(shown("\U0001f30a.") == "|||\U0001f30a|.|");
}

TEST_CASE("StreamingDecoder: what is not UTF-8 is passed on as soon as that is clear") {
  CHECK(shown("\xff\x80x") == "\xff|\x80|x|");
  CHECK(shown("\xe4x") == "|\xe4x|");
  CHECK(shown("\xe4\xbdx") == "||\xe4\xbdx|");
  CHECK(shown("\xe4\xe4\xbd\xa0") == "|\xe4||\xe4\xbd\xa0|");
  CHECK(shown("\xc0\xaf") == "\xc0|\xaf|");
}

TEST_CASE("StreamingDecoder: finish gives what was held back, once") {
  CHECK(shown("\xf0\x9f\x8c") == "|||\xf0\x9f\x8c");
  StreamingDecoder decoder;
  CHECK(decoder.next(0xe4) == "");
  CHECK(decoder.finish() == "\xe4");
  CHECK(decoder.finish() == "");
  CHECK(decoder.next('a') == "a");
}

}  // namespace
}  // namespace headwater
