// A file system with faults, and a folder for a test's files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/files.h"

namespace headwater {

/// A fresh empty folder that goes with the object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const Path& path() const { return path_; }

 private:
  Path path_;
};

/// Thrown in place of the process's death: nothing that runs afterwards reaches the disk.
struct SimulatedStop {};

/// What goes wrong. Calls that can change or read the disk are counted from 1; close and unmap are not
/// counted, since a failure to close after a sync loses nothing.
struct Faults {
  int failing_call = 0;  ///< this call fails with error_number; 0: none
  int error_number = 0;
  size_t longest_write = SIZE_MAX;  ///< more is written only in part, as write() may
  int stopping_call = 0;            ///< instead of this call the process stops; 0: never
  int64_t stopping_byte = -1;       ///< the process stops once so many bytes were written; -1: never
  bool exits = false;               ///< stop by _exit, as kill -9 does, instead of throwing SimulatedStop
};

/// Passes every call to the real file system until a fault is due. Does not sync to disk: tests are fast.
class FaultyFileSystem : public FileSystem {
 public:
  explicit FaultyFileSystem(const Faults& faults = {}) : faults_(faults) {}

  bool has_failed() const { return has_failed_; }
  bool has_stopped() const { return has_stopped_; }

  int open(const Path& path, int flags, mode_t mode) override;
  ssize_t read(int file, void* bytes, size_t size) override;
  ssize_t write(int file, const void* bytes, size_t size) override;
  int fsync(int file) override;
  int status_of(int file, struct ::stat& status) override;
  void* map(int file, size_t size) override;
  int lock(int file) override;
  int status(const Path& path, struct ::stat& status, bool follow_links) override;
  int rename(const Path& from, const Path& to) override;
  int exchange(const Path& first, const Path& second) override;
  int unlink(const Path& path) override;
  int make_directory(const Path& path) override;
  int remove_directory(const Path& path) override;
  int list(const Path& path, std::vector<std::string>& names) override;

 private:
  /// True if the call that is about to be made fails; errno is set.
  bool fails();
  void stop();

  Faults faults_;
  int n_calls_ = 0;
  int64_t n_bytes_ = 0;
  bool has_failed_ = false;
  bool has_stopped_ = false;
};

/// Keeps what a disk would hold after a power loss: the bytes of a file as they were when it was last
/// synced, the entries of a folder as they were when it was last synced.
class PowerLossFileSystem : public FaultyFileSystem {
 public:
  /// What reaches the disk without having been synced, since it may write in any order: nothing, all names,
  /// all bytes, or all removals but the first of each folder.
  enum class Survivors { nothing, entries, bytes, removals };

  /// All that is under `root` now is on the disk.
  PowerLossFileSystem(const Path& root, const Faults& faults);
  ~PowerLossFileSystem() override;

  int open(const Path& path, int flags, mode_t mode) override;
  int fsync(int file) override;
  int make_directory(const Path& path) override;

  /// Builds in `target` what the root holds once the power is back.
  void restore(const Path& target, Survivors survivors);

 private:
  using Entries = std::map<std::string, ino_t>;

  /// Keeps a file open, so that its inode number is not used again, and returns that number.
  ino_t hold(const Path& path);
  void persist(int file);
  Entries live_entries(int folder);
  bool is_removed(ino_t inode) const;
  void restore_folder(ino_t folder, const Path& target, Survivors survivors);

  std::map<ino_t, int> held_;
  std::map<ino_t, Entries> durable_entries_;
  std::map<ino_t, std::string> durable_bytes_;
  ino_t root_;
};

}  // namespace headwater
