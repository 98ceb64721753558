#include "core/safetensors.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <random>

#include "core/error.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"

namespace headwater {
namespace {

std::string file_bytes(const std::string& header, const std::string& data = {}) {
  const uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

/// A file of given bytes; nothing is synced, tests write thousands.
class TestFile {
 public:
  explicit TestFile(const std::string& bytes) {
    OutputFile file(path());
    file.write(bytes);
    file.close();
  }
  Path path() const { return folder_.path() / "model.safetensors"; }

 private:
  TemporaryFolder folder_;
};

/// The message of the error without the path, which must lead it; empty if the file opens.
std::string refusal_of(const std::string& bytes) {
  const TestFile file(bytes);
  try {
    SafetensorsFile::open(file.path());
    return {};
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::input);
    const std::string text = error.what();
    const std::string start = file.path().string() + ": ";
    REQUIRE(text.substr(0, start.size()) == start);
    return text.substr(start.size());
  }
}

std::string refusal_of_header(const std::string& header, size_t n_data_bytes = 0) {
  return refusal_of(file_bytes(header, std::string(n_data_bytes, 'd')));
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return fmt::format(R"({{"dtype":"{}","shape":{},"data_offsets":{}}})", dtype, shape, offsets);
}

std::string header_of(const std::string& name, const std::string& value) {
  return fmt::format(R"({{"{}":{}}})", name, value);
}

std::vector<NamedTensor> some_tensors() {
  return {{"bytes", Tensor::from_vector<uint8_t>({3}, {1, 2, 3})},
          {"weight", Tensor::from_vector<float>({2, 2}, {1, -2, 3.5, NAN})},
          {"doubles", Tensor::from_vector<double>({1, 2}, {0.1, -INFINITY})},
          {"brain", Tensor::full({3}, 1.5, DType::bf16)},
          {"index", Tensor::from_vector<int64_t>({2}, {-1, INT64_MAX})},
          {"small index", Tensor::from_vector<int32_t>({1}, {INT32_MIN})},
          {"scalar", Tensor::from_vector<float>({}, {7})},
          {"nothing", Tensor::zeros({0, 5}, DType::f32)}};
}

TEST_CASE("safetensors: what is written is read back, bit for bit") {
  TemporaryFolder folder;
  const Path path = folder.path() / "model.safetensors";
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"a \"key\"\n", "\\ 水 \t"}};
  write_safetensors(path, some_tensors(), metadata);
  const SafetensorsFile file = SafetensorsFile::open(path);
  CHECK(file.metadata() == metadata);
  CHECK(file.names().size() == some_tensors().size());
  for (const auto& [name, tensor] : some_tensors()) {
    INFO(name);
    REQUIRE(file.contains(name));
    const Tensor read = file.tensor(name);
    CHECK(read.shape() == tensor.shape());
    CHECK(read.dtype() == tensor.dtype());
    CHECK(std::memcmp(read.raw_data(), tensor.raw_data(), static_cast<size_t>(tensor.size_bytes())) == 0);
  }
}

TEST_CASE("safetensors: large types come first, then names, and data begins at a multiple of 8") {
  TemporaryFolder folder;
  const Path path = folder.path() / "model.safetensors";
  write_safetensors(path, some_tensors(), {});
  const std::string bytes = read_text_file(path, 10000);
  const uint64_t header_length =
      static_cast<unsigned char>(bytes[0]) + 256u * static_cast<unsigned char>(bytes[1]);
  CHECK(header_length % 8 == 0);
  size_t previous = 0;
  for (const char* name :
       {"doubles", "index", "nothing", "scalar", "small index", "weight", "brain", "bytes"}) {
    const size_t position = bytes.find(fmt::format("\"{}\"", name));
    CHECK(position != std::string::npos);
    CHECK(position > previous);
    previous = position;
  }
}

TEST_CASE("safetensors: a tensor keeps its file mapped") {
  Tensor tensor;
  {
    TemporaryFolder folder;
    write_safetensors(folder.path() / "f", {{"x", Tensor::from_vector<float>({2}, {4, 5})}}, {});
    tensor = SafetensorsFile::open(folder.path() / "f").tensor("x");
  }
  CHECK(tensor.to_vector<float>() == std::vector<float>{4, 5});
}

TEST_CASE("safetensors: data that is not aligned is read all the same") {
  for (size_t padding = 0; padding < 8; ++padding) {
    const std::vector<double> values = {1.5, -2.5};
    std::string data(16, '\0');
    std::memcpy(data.data(), values.data(), 16);
    const std::string header = header_of("x", entry("F64", "[2]", "[0,16]")) + std::string(padding, ' ');
    const TestFile file(file_bytes(header, data));
    CHECK(SafetensorsFile::open(file.path()).tensor("x").to_vector<double>() == values);
  }
}

TEST_CASE("safetensors: half precision is read as float32") {
  const std::vector<std::pair<uint16_t, float>> cases = {
      {0x0000, 0.0f},     {0x8000, -0.0f},       {0x3c00, 1.0f},     {0xc000, -2.0f},    {0x7bff, 65504.0f},
      {0x0001, 0x1p-24f}, {0x83ff, -0x3ffp-24f}, {0x0400, 0x1p-14f}, {0x7c00, INFINITY}, {0xfc00, -INFINITY}};
  std::string data;
  for (const auto& [half, value] : cases) data.append(reinterpret_cast<const char*>(&half), 2);
  const TestFile file(file_bytes(header_of("x", entry("F16", "[10]", "[0,20]")), data));
  const Tensor tensor = SafetensorsFile::open(file.path()).tensor("x");
  CHECK(tensor.dtype() == DType::f32);
  for (size_t i = 0; i < cases.size(); ++i) {
    CHECK(tensor.data<float>()[i] == cases[i].second);
    CHECK(std::signbit(tensor.data<float>()[i]) == std::signbit(cases[i].second));
  }
}

TEST_CASE("safetensors: a dtype without tensors of ours is listed and refused when read") {
  const TestFile file(file_bytes(header_of("mask", entry("BOOL", "[2]", "[0,2]")), "ab"));
  const SafetensorsFile opened = SafetensorsFile::open(file.path());
  CHECK(opened.names() == std::vector<std::string>{"mask"});
  CHECK(opened.entry("mask").shape == Shape({2}));
  CHECK_THROWS_WITH(opened.tensor("mask"),
                    ContainsSubstring("tensor 'mask' has dtype BOOL, which cannot be read"));
}

TEST_CASE("safetensors: a missing tensor is named beside those that are there") {
  const TestFile file(file_bytes(header_of("a", entry("U8", "[1]", "[0,1]")), "x"));
  CHECK_THROWS_WITH(SafetensorsFile::open(file.path()).tensor("b"),
                    ContainsSubstring("has no tensor 'b'; it has 1: 'a'"));
}

TEST_CASE("safetensors: escapes, blanks and an empty file are read") {
  const std::string header =
      " { \"a\\u0041\\\"\\ud83c\\udf0a\" :\n{\"shape\" : [ 1 , 1 "
      "],\t\"data_offsets\":[0,1],\"dtype\":\"U8\"} }  ";
  const TestFile file(file_bytes(header.substr(1), "x"));
  CHECK(SafetensorsFile::open(file.path()).names() == std::vector<std::string>{"aA\"\xf0\x9f\x8c\x8a"});
  CHECK(refusal_of_header("{}").empty());
}

TEST_CASE("safetensors: hostile lengths") {
  const auto with_length = [](uint64_t length) {
    std::string bytes = file_bytes("{}");
    std::memcpy(bytes.data(), &length, sizeof(length));
    return refusal_of(bytes);
  };
  CHECK(refusal_of("") == "has only 0 bytes; a safetensors file begins with an 8-byte length");
  CHECK(refusal_of("1234567") == "has only 7 bytes; a safetensors file begins with an 8-byte length");
  CHECK(with_length(0) == "its safetensors header has length 0; the file is damaged");
  CHECK(with_length(3) == "its safetensors header has 3 bytes, but only 2 follow: it was cut off");
  CHECK_THAT(with_length(uint64_t{1} << 63),
             ContainsSubstring("begins with the header length 9223372036854775808, more"));
  CHECK_THAT(with_length(100'000'001), ContainsSubstring("more than the 100000000 that are allowed"));
  CHECK_THAT(with_length(~uint64_t{0}), ContainsSubstring("header length 18446744073709551615"));
}

TEST_CASE("safetensors: headers that are not the format's JSON") {
  CHECK_THAT(refusal_of_header("[]"), ContainsSubstring("does not begin with '{'"));
  CHECK_THAT(refusal_of_header(" {}"), ContainsSubstring("does not begin with '{'"));
  CHECK_THAT(refusal_of_header("{"), ContainsSubstring("ends too early at byte 1 of 1"));
  CHECK_THAT(refusal_of_header("{} x"), ContainsSubstring("has text after the closing brace at byte 2"));
  CHECK_THAT(refusal_of_header("{\"a\xff\":1}"), ContainsSubstring("is not UTF-8 at byte 3"));
  CHECK_THAT(refusal_of_header("{\"a"), ContainsSubstring("has a string without an end"));
  CHECK_THAT(refusal_of_header("{\"a\\"), ContainsSubstring("has an unknown escape"));
  CHECK_THAT(refusal_of_header("{\"a\\\\"), ContainsSubstring("has a string without an end"));
  CHECK_THAT(refusal_of_header("{\"a\\x\":1}"), ContainsSubstring("has an unknown escape"));
  CHECK_THAT(refusal_of_header("{\"\\u12g4\":1}"), ContainsSubstring("has an escape without four digits"));
  CHECK_THAT(refusal_of_header("{\"\\udc00\":1}"), ContainsSubstring("has half a surrogate pair"));
  CHECK_THAT(refusal_of_header("{\"\\ud800\":1}"), ContainsSubstring("has half a surrogate pair"));
  CHECK_THAT(refusal_of_header("{\"\\ud800\\u0041\":1}"), ContainsSubstring("has half a surrogate pair"));
  CHECK_THAT(refusal_of_header("{\"a\nb\":1}"), ContainsSubstring("has a control character"));
  CHECK_THAT(refusal_of_header("{\"a\nb\\n\":1}"), ContainsSubstring("has a control character"));
  CHECK_THAT(refusal_of_header("{\"a\" 1}"), ContainsSubstring("lacks a ':'"));
  CHECK_THAT(refusal_of_header("{{\"a\":1}}"), ContainsSubstring("is nested where it must not be"));
  CHECK_THAT(refusal_of_header("{\"a\":1}"), ContainsSubstring("tensor 'a' is not described by an object"));
  CHECK_THAT(refusal_of_header(std::string(1'000'000, '{')), ContainsSubstring("nested"));
  CHECK_THAT(refusal_of_header(header_of("a", std::string(1'000'000, '['))),
             ContainsSubstring("not described by an object"));
}

TEST_CASE("safetensors: entries with wrong keys or types") {
  const auto refusal = [](const std::string& value) { return refusal_of_header(header_of("t", value), 4); };
  CHECK(refusal("{}") == "tensor 't' has no 'dtype'");
  CHECK(refusal("{\"dtype\":\"F32\"}") == "tensor 't' has no 'shape'");
  CHECK(refusal("{\"dtype\":\"F32\",\"shape\":[]}") == "tensor 't' has no 'data_offsets'");
  CHECK(refusal("{\"dtype\":\"F32\",\"dtype\":\"F32\"}") == "tensor 't' has 'dtype' twice");
  CHECK_THAT(refusal("{\"strides\":[1]}"), ContainsSubstring("tensor 't' has the unknown key 'strides'"));
  CHECK(refusal("{\"dtype\":32}") == "tensor 't' has a dtype that is not a string");
  CHECK_THAT(refusal(entry("F31", "[1]", "[0,4]")),
             ContainsSubstring("tensor 't' has the unknown dtype 'F31'"));
  CHECK(refusal(entry("F32", "1", "[0,4]")) == "tensor 't' has a shape that is not a list");
  CHECK(refusal(entry("F32", "[1]", "4")) == "tensor 't' has data_offsets that are not a list");
  CHECK(refusal(entry("F32", "[1]", "[0]")) == "tensor 't' has fewer than two data_offsets");
  CHECK(refusal(entry("F32", "[1]", "[0,4,8]")) == "tensor 't' has more than two data_offsets");
  CHECK(refusal(entry("F32", "[[1]]", "[0,4]")) == "tensor 't' has nesting in its shape");
  CHECK(refusal(entry("F32", "[\"1\"]", "[0,4]")) == "tensor 't' has no number in its shape");
  CHECK(refusal(entry("F32", "[1,1,1,1,1,1,1]", "[0,4]")) == "tensor 't' has more than 6 axes");
  CHECK_THAT(refusal(entry("F32", std::string(1'000'000, '['), "")),
             ContainsSubstring("nesting in its shape"));
}

TEST_CASE("safetensors: sizes that are no sizes") {
  const auto refusal = [](const std::string& size) {
    return refusal_of_header(header_of("t", entry("F32", fmt::format("[{}]", size), "[0,4]")), 4);
  };
  CHECK(refusal("1").empty());
  CHECK(refusal("-1") == "tensor 't' has '-1' in its shape, which is negative");
  CHECK(refusal("1.0") == "tensor 't' has '1.0' in its shape, which is not a whole number");
  CHECK(refusal("1e0") == "tensor 't' has '1e0' in its shape, which is not a whole number");
  CHECK(refusal("01") == "tensor 't' has '01' in its shape, which begins with 0");
  CHECK(refusal("9223372036854775808") ==
        "tensor 't' has '9223372036854775808' in its shape, which is 2^63 or more");
  CHECK_THAT(refusal(std::string(1'000'000, '9')),
             ContainsSubstring("...' in its shape, which is 2^63 or more"));
  CHECK(refusal("null") == "tensor 't' has no number in its shape");
  CHECK(refusal("4294967296,4294967296") ==
        "tensor 't' of shape (4294967296, 4294967296) and dtype F32 has no size: it overflows or ends inside "
        "a byte");
  CHECK_THAT(refusal("4294967296,4294967296,0"), ContainsSubstring("overflows"));
  CHECK(refusal("2") == "tensor 't' of shape (2) and dtype F32 must have 8 bytes, its data_offsets span 4");
  CHECK_THAT(refusal_of_header(header_of("t", entry("F4", "[3]", "[0,1]")), 1),
             ContainsSubstring("ends inside a byte"));
}

TEST_CASE("safetensors: data with overlaps, holes, or not all there") {
  const auto refusal = [](const std::string& first, const std::string& second, size_t n_data_bytes) {
    return refusal_of_header(fmt::format(R"({{"a":{},"b":{}}})", first, second), n_data_bytes);
  };
  const std::string first = entry("U8", "[4]", "[0,4]");
  CHECK(refusal(first, entry("U8", "[4]", "[4,8]"), 8).empty());
  CHECK(refusal(first, entry("U8", "[4]", "[3,7]"), 7) ==
        "tensor 'b' overlaps the tensor before it: it begins at byte 3 of the data, that ends at 4");
  CHECK(refusal(first, entry("U8", "[4]", "[0,4]"), 4) ==
        "tensor 'b' overlaps the tensor before it: it begins at byte 0 of the data, that ends at 4");
  CHECK(refusal(first, entry("U8", "[4]", "[6,10]"), 10) ==
        "bytes 4 to 6 of the data, before tensor 'b', belong to no tensor");
  CHECK(refusal(first, entry("U8", "[0]", "[6,5]"), 6) ==
        "tensor 'b' begins at byte 6 of the data, after its end at 5");
  CHECK(refusal(first, entry("U8", "[4]", "[4,8]"), 7) ==
        "tensor 'b' ends at byte 8 of the data, but the file holds only 7: it was cut off");
  CHECK(refusal(first, entry("U8", "[4]", "[4,8]"), 10) ==
        "2 bytes follow the last tensor, which ends at byte 8 of the data");
  CHECK(refusal_of_header("{}", 1) == "1 bytes follow the last tensor, which ends at byte 0 of the data");
  CHECK(refusal_of_header(fmt::format(R"({{"a":{},"a":{}}})", first, entry("U8", "[0]", "[4,4]")), 4) ==
        "tensor 'a' is in the header twice");
}

TEST_CASE("safetensors: metadata is one map of strings") {
  CHECK(refusal_of_header("{\"__metadata__\":{\"format\":\"pt\"}}").empty());
  CHECK_THAT(refusal_of_header("{\"__metadata__\":[]}"), ContainsSubstring("nested where it must not be"));
  CHECK_THAT(refusal_of_header("{\"__metadata__\":{\"n\":1}}"),
             ContainsSubstring("has metadata 'n' that is not a string"));
  CHECK_THAT(refusal_of_header("{\"__metadata__\":{\"n\":\"\",\"n\":\"\"}}"),
             ContainsSubstring("has metadata 'n' twice"));
  CHECK_THAT(refusal_of_header("{\"__metadata__\":{},\"__metadata__\":{}}"),
             ContainsSubstring("'__metadata__' twice"));
}

TEST_CASE("safetensors: the number of names is bounded") {
  std::string header = "{";
  for (size_t i = 0; i <= max_safetensors_tensors; ++i) {
    header += fmt::format("\"{}\":{},", i, entry("U8", "[0]", "[0,0]"));
  }
  header.back() = '}';
  CHECK_THAT(refusal_of_header(header), ContainsSubstring("has more than 1000000 tensors"));
}

TEST_CASE("safetensors: a long or strange name is shortened in messages") {
  const std::string message = refusal_of_header(header_of(std::string(1000, 'n') + "\\u0007", "1"));
  CHECK(message == "tensor '" + std::string(120, 'n') + "...' is not described by an object");
  CHECK(refusal_of_header("{\"a\\u001b[2J\":1}") == "tensor 'a?[2J' is not described by an object");
}

/// Opens and reads everything; true if the file was accepted. Any fault must be an input error.
bool is_accepted(const Path& path) {
  try {
    const SafetensorsFile file = SafetensorsFile::open(path);
    for (const SafetensorsEntry& found : file.entries()) {
      if (found.dtype <= SafetensorsDType::f16) file.tensor(found.name).clone();
    }
    return true;
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::input) throw;
    return false;
  }
}

TEST_CASE("safetensors: no cut does more than raise an input error") {
  TemporaryFolder folder;
  const Path path = folder.path() / "model";
  write_safetensors(path, some_tensors(), {{"format", "pt"}});
  REQUIRE(is_accepted(path));
  for (uintmax_t size = std::filesystem::file_size(path); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    if (is_accepted(path)) FAIL("cut to " << size << " bytes and accepted");
  }
}

TEST_CASE("safetensors: no flipped bit does more than raise an input error") {
  TemporaryFolder folder;
  const Path path = folder.path() / "model";
  write_safetensors(path, some_tensors(), {{"format", "pt"}});
  const std::string whole = read_text_file(path, 10000);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](size_t position, char byte) {
    file.seekp(static_cast<std::streamoff>(position));
    file.put(byte).flush();
  };
  for (size_t position = 0; position < whole.size(); ++position) {
    for (int bit = 0; bit < 8; ++bit) {
      put(position, static_cast<char>(whole[position] ^ (1 << bit)));
      const bool is_in_length = position < sizeof(uint64_t);
      if (is_accepted(path) && is_in_length)
        FAIL("byte " << position << ", bit " << bit << " flipped and accepted");
    }
    put(position, whole[position]);
  }
  CHECK(is_accepted(path));
}

TEST_CASE("safetensors: random edits of a header do no more than raise an input error") {
  TemporaryFolder folder;
  const Path path = folder.path() / "edited";
  std::mt19937 random(20261123);
  const std::string seed = "{\"__metadata__\":{\"k\":\"v\"},\"a\":" + entry("F32", "[2,1]", "[0,8]") +
                           ",\"\\u0062\":" + entry("F16", "[]", "[8,10]") + "}";
  const std::string alphabet = "{}[]\",:\\u0123456789-+.eE ndtabpe\xff\x80\xc3";
  for (int round = 0; round < 3000; ++round) {
    std::filesystem::remove(path);  // some file systems flush a file that is emptied and written again
    std::string header = seed;
    for (uint32_t edit = random() % 4 + 1; edit > 0; --edit) {
      const size_t position = random() % header.size();
      const char character = alphabet[random() % alphabet.size()];
      switch (random() % 3) {
        case 0:
          header[position] = character;
          break;
        case 1:
          header.insert(position, 1, character);
          break;
        default:
          header.erase(position, random() % 8);
          break;
      }
      if (header.empty()) header.push_back('{');
    }
    OutputFile file(path);
    file.write(file_bytes(header, std::string(10, 'd')));
    file.close();
    is_accepted(path);
  }
}

TEST_CASE("safetensors: tensors that cannot be written are refused by name") {
  TemporaryFolder folder;
  const Tensor tensor = Tensor::zeros({1}, DType::f32);
  const auto write = [&](const std::vector<NamedTensor>& tensors) {
    write_safetensors(folder.path() / "model", tensors, {});
  };
  CHECK_THROWS_WITH(write({{"", tensor}}), ContainsSubstring("cannot write tensor '': the name is reserved"));
  CHECK_THROWS_WITH(write({{"__metadata__", tensor}}), ContainsSubstring("the name is reserved"));
  CHECK_THROWS_WITH(write({{"a\xff", tensor}}), ContainsSubstring("the name is not UTF-8"));
  CHECK_THROWS_WITH(write({{"a", Tensor()}}), ContainsSubstring("cannot write tensor 'a': it is undefined"));
  CHECK_THROWS_WITH(write({{"a", tensor}, {"b", tensor}, {"a", tensor}}),
                    ContainsSubstring("cannot write tensor 'a': there are two"));
  CHECK_THROWS_WITH(write_safetensors(folder.path() / "model", {}, {{"k", "\xff"}}),
                    ContainsSubstring("metadata 'k' is not UTF-8"));
  CHECK(list_directory(folder.path()).empty());
}

TEST_CASE("safetensors: a write that fails anywhere leaves the old file") {
  TemporaryFolder folder;
  const Path path = folder.path() / "model.safetensors";
  write_safetensors(path, {{"old", Tensor::zeros({1}, DType::f32)}}, {});
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.failing_call = n, .error_number = ENOSPC, .longest_write = 50});
    FileSystemOverride override(faulty);
    try {
      write_safetensors(path, some_tensors(), {});
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::machine);
    }
    if (!faulty.has_failed()) break;
    CHECK(list_directory(folder.path()).size() == 1);
    REQUIRE(is_accepted(path));
    REQUIRE(n < 200);
  }
}

TEST_CASE("safetensors: every golden file survives reading, writing and reading") {
  TemporaryFolder folder;
  FaultyFileSystem unsynced;
  FileSystemOverride override(unsynced);
  const Path golden = Path(HEADWATER_SOURCE_DIR) / "tests/golden";
  int n_files = 0;
  for (const std::string& name : list_directory(golden)) {
    if (Path(name).extension() != ".safetensors") continue;
    INFO(name);
    ++n_files;
    const SafetensorsFile original = SafetensorsFile::open(golden / name);
    CHECK(original.metadata().at("format") == "ssm-golden/1");
    std::vector<NamedTensor> tensors;
    for (const std::string& tensor : original.names()) tensors.push_back({tensor, original.tensor(tensor)});
    REQUIRE(!tensors.empty());
    write_safetensors(folder.path() / name, tensors, original.metadata());
    const SafetensorsFile copy = SafetensorsFile::open(folder.path() / name);
    CHECK(copy.metadata() == original.metadata());
    REQUIRE(copy.names() == original.names());
    for (const SafetensorsEntry& found : original.entries()) {
      CHECK(copy.entry(found.name).shape == found.shape);
      CHECK(copy.entry(found.name).dtype == found.dtype);
      CHECK((copy.bytes(copy.entry(found.name)) == original.bytes(found)));
    }
  }
  CHECK(n_files > 70);
}

}  // namespace
}  // namespace headwater
