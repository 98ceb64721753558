#include "tests/faulty_files.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>

namespace headwater {

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "headwater-test-XXXXXX").string();
  if (!::mkdtemp(name.data())) throw std::runtime_error("cannot make a temporary folder");
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  remove_tree_quietly(path_);
}

void FaultyFileSystem::stop() {
  if (faults_.exits) ::_exit(137);
  if (has_stopped_) return;
  has_stopped_ = true;
  throw SimulatedStop{};
}

bool FaultyFileSystem::fails() {
  if (has_stopped_) {
    errno = EIO;  // a dead process changes nothing; only its destructors still run here
    return true;
  }
  ++n_calls_;
  if (n_calls_ == faults_.stopping_call) stop();
  if (n_calls_ != faults_.failing_call) return false;
  has_failed_ = true;
  errno = faults_.error_number;
  return true;
}

int FaultyFileSystem::open(const Path& path, int flags, mode_t mode) {
  return fails() ? -1 : FileSystem::open(path, flags, mode);
}

ssize_t FaultyFileSystem::read(int file, void* bytes, size_t size) {
  return fails() ? -1 : FileSystem::read(file, bytes, size);
}

ssize_t FaultyFileSystem::write(int file, const void* bytes, size_t size) {
  if (fails()) return -1;
  size = std::min(size, faults_.longest_write);
  const bool reaches_stop =
      faults_.stopping_byte >= 0 && n_bytes_ + static_cast<int64_t>(size) > faults_.stopping_byte;
  if (reaches_stop) size = static_cast<size_t>(faults_.stopping_byte - n_bytes_);
  const ssize_t n_written = FileSystem::write(file, bytes, size);
  n_bytes_ += n_written;
  if (reaches_stop) stop();
  return n_written;
}

int FaultyFileSystem::truncate(int file, uint64_t size) {
  return fails() ? -1 : FileSystem::truncate(file, size);
}

int FaultyFileSystem::fsync(int) {
  return fails() ? -1 : 0;
}

int FaultyFileSystem::status_of(int file, struct ::stat& status) {
  return fails() ? -1 : FileSystem::status_of(file, status);
}

void* FaultyFileSystem::map(int file, size_t size) {
  return fails() ? nullptr : FileSystem::map(file, size);
}

int FaultyFileSystem::lock(int file) {
  return fails() ? -1 : FileSystem::lock(file);
}

int FaultyFileSystem::status(const Path& path, struct ::stat& status, bool follow_links) {
  return fails() ? -1 : FileSystem::status(path, status, follow_links);
}

int FaultyFileSystem::rename(const Path& from, const Path& to) {
  return fails() ? -1 : FileSystem::rename(from, to);
}

int FaultyFileSystem::exchange(const Path& first, const Path& second) {
  return fails() ? -1 : FileSystem::exchange(first, second);
}

int FaultyFileSystem::unlink(const Path& path) {
  return fails() ? -1 : FileSystem::unlink(path);
}

int FaultyFileSystem::make_directory(const Path& path) {
  return fails() ? -1 : FileSystem::make_directory(path);
}

int FaultyFileSystem::remove_directory(const Path& path) {
  return fails() ? -1 : FileSystem::remove_directory(path);
}

int FaultyFileSystem::list(const Path& path, std::vector<std::string>& names) {
  return fails() ? -1 : FileSystem::list(path, names);
}

}  // namespace headwater
