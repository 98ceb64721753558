#include "core/files.h"

#include <unistd.h>

#include <cerrno>

#include "core/error.h"
#include "core/hash.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"

namespace headwater {
namespace {

TEST_CASE("files: write_file_atomically replaces the whole file or leaves it") {
  TemporaryFolder folder;
  const Path path = folder.path() / "config.yaml";
  write_file_atomically(path, "old");
  write_file_atomically(path, "new");
  CHECK(read_text_file(path, 100) == "new");
  CHECK(list_directory(folder.path()) == std::vector<std::string>{"config.yaml"});
}

TEST_CASE("files: an atomic write that fails anywhere leaves the old bytes and no temporary file") {
  const int error_number = GENERATE(ENOSPC, EIO, EDQUOT, EROFS);
  TemporaryFolder folder;
  const Path path = folder.path() / "config.yaml";
  write_file_atomically(path, "old");
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.failing_call = n, .error_number = error_number});
    FileSystemOverride override(faulty);
    try {
      write_file_atomically(path, "new");
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::machine);
      CHECK_THAT(error.what(), ContainsSubstring(folder.path().string()));
    }
    if (!faulty.has_failed()) break;
    const std::string bytes = read_text_file(path, 100);
    CHECK((bytes == "old" || bytes == "new"));
    CHECK(list_directory(folder.path()) == std::vector<std::string>{"config.yaml"});
    REQUIRE(n < 100);
  }
  CHECK(read_text_file(path, 100) == "new");
}

TEST_CASE("files: interrupted calls and short writes are carried on") {
  TemporaryFolder folder;
  const Path path = folder.path() / "bytes";
  const std::string bytes(5000, 'x');
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.failing_call = n, .error_number = EINTR, .longest_write = 999});
    FileSystemOverride override(faulty);
    write_file_atomically(path, bytes);
    CHECK(read_text_file(path, 10000) == bytes);
    if (!faulty.has_failed()) break;
    REQUIRE(n < 100);
  }
}

TEST_CASE("files: a full disk is a machine error that says how much was wanted") {
  TemporaryFolder folder;
  OutputFile file(folder.path() / "weights");
  file.write(std::string(3000, 'x'));
  FaultyFileSystem faulty({.failing_call = 1, .error_number = ENOSPC});
  FileSystemOverride override(faulty);
  CHECK_THROWS_WITH(file.flush(),
                    (folder.path() / "weights").string() +
                        ": cannot write: No space left on device (2.9 KiB more wanted, 2.9 KiB in all "
                        "so far); free some space; df -h shows what is left");
}

TEST_CASE("files: a large file passes the buffer unchanged") {
  TemporaryFolder folder;
  std::string expected;
  OutputFile file(folder.path() / "large");
  for (size_t size : {1u, 1000u, 1048575u, 1048576u, 1048577u, 3u, 2500000u}) {
    const std::string piece(size, static_cast<char>('a' + size % 26));
    file.write(piece);
    expected += piece;
  }
  CHECK(file.size_bytes() == expected.size());
  file.close();
  const auto mapped = MappedFile::open(folder.path() / "large");
  CHECK(std::string(reinterpret_cast<const char*>(mapped->data()), mapped->size()) == expected);
}

TEST_CASE("files: modes of OutputFile") {
  TemporaryFolder folder;
  const Path path = folder.path() / "log";
  const auto write = [&](OutputFile::Mode mode, std::string_view text) {
    OutputFile file(path, mode);
    file.write(text);
    file.close();
    return read_text_file(path, 100);
  };
  CHECK(write(OutputFile::Mode::append, "one ") == "one ");
  CHECK(write(OutputFile::Mode::append, "two") == "one two");
  CHECK(write(OutputFile::Mode::truncate, "three") == "three");
  CHECK_THROWS_WITH(write(OutputFile::Mode::exclusive, "four"),
                    ContainsSubstring("cannot create: File exists"));
}

TEST_CASE("files: unreadable paths are input errors that name the path") {
  TemporaryFolder folder;
  const std::string missing = (folder.path() / "missing").string();
  const std::string here = folder.path().string();
  CHECK_THROWS_WITH(MappedFile::open(missing),
                    missing + ": cannot open: No such file or directory; check the spelling of the path");
  CHECK_THROWS_WITH(MappedFile::open(here),
                    here + ": cannot map: Is a directory; it is a folder; give a file");
  CHECK_THROWS_WITH(read_text_file(here, 9),
                    here + ": cannot read: Is a directory; it is a folder; give a file");
  CHECK_THROWS_WITH(MappedFile::open("/dev/null"), ContainsSubstring("give a regular file"));
  write_file_atomically(folder.path() / "long", "0123456789");
  CHECK_THROWS_WITH(read_text_file(folder.path() / "long", 9), ContainsSubstring("larger than 9 bytes"));
  try {
    MappedFile::open(missing);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::input);
  }
}

TEST_CASE("files: a path that is too long is an input error, a non-ASCII one works") {
  TemporaryFolder folder;
  Path deep = folder.path();
  while (deep.string().size() < 4300) deep /= std::string(200, 'd');
  CHECK_THROWS_WITH(write_file_atomically(deep, "x"),
                    ContainsSubstring("File name too long; shorten the path"));
  const Path foreign = folder.path() / "Grüße 水源" / "état";
  make_directories(foreign);
  write_file_atomically(foreign / "ñ", "x");
  CHECK(read_text_file(foreign / "ñ", 1) == "x");
  write_file_atomically(folder.path() / std::string(255, 'n'),
                        "x");  // the longest name; its temporary fits too
}

TEST_CASE("files: an empty file maps to nothing") {
  TemporaryFolder folder;
  write_file_atomically(folder.path() / "empty", "");
  const auto mapped = MappedFile::open(folder.path() / "empty");
  CHECK(mapped->size() == 0);
  CHECK(mapped->data() == nullptr);
}

TEST_CASE("files: remove_tree removes links, not what they point to, and accepts a missing path") {
  TemporaryFolder folder;
  make_directories(folder.path() / "kept");
  write_file_atomically(folder.path() / "kept" / "file", "x");
  make_directories(folder.path() / "removed/below/");
  REQUIRE(::symlink((folder.path() / "kept").c_str(), (folder.path() / "removed/below/link").c_str()) == 0);
  remove_tree(folder.path() / "removed");
  remove_tree(folder.path() / "removed");
  CHECK_FALSE(path_exists(folder.path() / "removed"));
  CHECK(path_exists(folder.path() / "kept" / "file"));
}

TEST_CASE("files: sizes in words") {
  CHECK(bytes_text(0) == "0 bytes");
  CHECK(bytes_text(1) == "1 byte");
  CHECK(bytes_text(1536) == "1.5 KiB");
  CHECK(bytes_text(uint64_t{5} << 40) == "5.0 TiB");
  CHECK(bytes_text(~uint64_t{0}) == "16.0 EiB");
}

TEST_CASE("hash: pieces hash like the whole, and the values are XXH3's") {
  const std::string text = "the state is handed over";
  StreamingHash hash;
  hash.update(text.data(), 9);
  CHECK(hash.value() == hash_bytes(text.data(), 9));
  hash.update(text.data() + 9, text.size() - 9);
  CHECK(hash.value() == hash_bytes(text.data(), text.size()));
  CHECK(hash_text(hash_bytes("", 0)) == "2d06800538d394c2");  // of the XXH3 specification
}

}  // namespace
}  // namespace headwater
