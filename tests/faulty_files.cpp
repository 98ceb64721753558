#include "tests/faulty_files.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace headwater {

TemporaryFolder::TemporaryFolder() {
  // Memory where there is some: tests make tens of thousands of small files.
  const bool has_memory = ::access("/dev/shm", W_OK | X_OK) == 0;
  const Path parent = has_memory ? Path("/dev/shm") : std::filesystem::temp_directory_path();
  std::string name = (parent / "headwater-test-XXXXXX").string();
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

int FaultyFileSystem::fsync(int) {
  return fails() ? -1 : 0;
}

int FaultyFileSystem::status_of(int file, struct ::stat& status) {
  return fails() ? -1 : FileSystem::status_of(file, status);
}

void* FaultyFileSystem::map(int file, size_t size) {
  const bool can_fail = faults_.error_number != EINTR;  // mmap is not interrupted
  return can_fail && fails() ? nullptr : FileSystem::map(file, size);
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

namespace {

Path path_of(int file) {
  return fmt::format("/proc/self/fd/{}", file);
}

std::string bytes_of(int file) {
  std::ifstream stream(path_of(file), std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

ino_t inode_of(const Path& path) {
  struct ::stat status {};
  if (::lstat(path.c_str(), &status) < 0) throw std::runtime_error("cannot look up " + path.string());
  return status.st_ino;
}

}  // namespace

PowerLossFileSystem::PowerLossFileSystem(const Path& root, const Faults& faults)
    : FaultyFileSystem(faults), root_(hold(root)) {
  persist(held_.at(root_));
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
    persist(held_.at(hold(entry.path())));
  }
}

PowerLossFileSystem::~PowerLossFileSystem() {
  for (const auto& [inode, file] : held_) ::close(file);
}

ino_t PowerLossFileSystem::hold(const Path& path) {
  const ino_t inode = inode_of(path);
  if (!held_.contains(inode)) held_[inode] = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  return inode;
}

PowerLossFileSystem::Entries PowerLossFileSystem::live_entries(int folder) {
  Entries entries;
  for (const auto& entry : std::filesystem::directory_iterator(path_of(folder))) {
    entries[entry.path().filename()] = hold(entry.path());
  }
  return entries;
}

void PowerLossFileSystem::persist(int file) {
  struct ::stat status {};
  ::fstat(file, &status);
  if (S_ISDIR(status.st_mode)) {
    durable_entries_[status.st_ino] = live_entries(file);
  } else {
    durable_bytes_[status.st_ino] = bytes_of(file);
  }
}

int PowerLossFileSystem::fsync(int file) {
  const int result = FaultyFileSystem::fsync(file);
  if (result == 0) persist(file);
  return result;
}

int PowerLossFileSystem::open(const Path& path, int flags, mode_t mode) {
  const int file = FaultyFileSystem::open(path, flags, mode);
  if (file >= 0) hold(path);
  return file;
}

int PowerLossFileSystem::make_directory(const Path& path) {
  const int result = FaultyFileSystem::make_directory(path);
  if (result == 0) hold(path);
  return result;
}

bool PowerLossFileSystem::is_removed(ino_t inode) const {
  struct ::stat status {};
  ::fstat(held_.at(inode), &status);
  return status.st_nlink == 0;
}

void PowerLossFileSystem::restore(const Path& target, Survivors survivors) {
  restore_folder(root_, target, survivors);
}

void PowerLossFileSystem::restore_folder(ino_t folder, const Path& target, Survivors survivors) {
  std::filesystem::create_directories(target);
  const bool is_live = survivors == Survivors::entries;
  int n_removed = 0;
  for (const auto& [name, inode] : is_live ? live_entries(held_.at(folder)) : durable_entries_[folder]) {
    if (survivors == Survivors::removals && is_removed(inode) && n_removed++ > 0) continue;
    if (std::filesystem::is_directory(path_of(held_.at(inode)))) {
      restore_folder(inode, target / name, survivors);
    } else {
      std::ofstream(target / name, std::ios::binary)
          << (survivors == Survivors::bytes ? bytes_of(held_.at(inode)) : durable_bytes_[inode]);
    }
  }
}

}  // namespace headwater
