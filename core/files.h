// Files: the one small layer through which every file call of the program goes, and what is built on it.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace headwater {

using Path = std::filesystem::path;

/// The system calls on files, as the system has them: -1 (or nullptr) and errno on failure. Tests replace
/// them to inject faults: the n-th call fails, a write is short, the power goes.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  virtual int open(const Path& path, int flags, mode_t mode);
  virtual ssize_t read(int file, void* bytes, size_t size);
  virtual ssize_t write(int file, const void* bytes, size_t size);
  /// Makes a file's bytes, or a folder's entries, survive a power loss.
  virtual int fsync(int file);
  virtual int close(int file);
  virtual int status_of(int file, struct ::stat& status);
  /// A read-only mapping of the first `size` > 0 bytes.
  virtual void* map(int file, size_t size);
  virtual int unmap(void* data, size_t size);
  /// An exclusive lock that dies with the process; -1 with EWOULDBLOCK where another holder has it.
  virtual int lock(int file);

  virtual int status(const Path& path, struct ::stat& status, bool follow_links);
  virtual int rename(const Path& from, const Path& to);
  /// Two names change places in one step; -1 with EINVAL where the file system cannot.
  virtual int exchange(const Path& first, const Path& second);
  virtual int unlink(const Path& path);
  virtual int make_directory(const Path& path);
  virtual int remove_directory(const Path& path);
  /// The names in a folder, without . and .., in no order.
  virtual int list(const Path& path, std::vector<std::string>& names);
};

/// The file system in use: the real one unless a FileSystemOverride lives.
FileSystem& file_system();

/// Replaces the file system for its own lifetime; for tests. Overrides nest; `replacement` must outlive it.
class FileSystemOverride {
 public:
  explicit FileSystemOverride(FileSystem& replacement);
  ~FileSystemOverride();
  FileSystemOverride(const FileSystemOverride&) = delete;
  FileSystemOverride& operator=(const FileSystemOverride&) = delete;

 private:
  FileSystem* previous_;
};

/// Throws for a failed call: an input error where the path is at fault (missing, not permitted, a folder in
/// place of a file, ...), else a machine error. The text is "PATH: cannot ACTION: ERRNO TEXT; ADVICE".
/// `detail` (may be empty) follows the errno's text.
[[noreturn]] void throw_file_error(std::string_view action, const Path& path, int error_number,
                                   std::string_view detail = {});

/// A file being written, through a buffer. Interrupted and short writes are carried on. Every member throws
/// as throw_file_error does; a full disk also says how many bytes were wanted. After a throw the file holds
/// a prefix of what was written and the buffer is dropped. The destructor does not throw: it drops the
/// buffer, closes, removes nothing.
class OutputFile {
 public:
  enum class Mode {
    truncate,   ///< a new file, or an old one emptied
    exclusive,  ///< a new file; an error if there is one
    append,     ///< go on at the end, or a new file
  };

  explicit OutputFile(const Path& path, Mode mode = Mode::truncate);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const void* bytes, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }
  /// Hands the buffer to the system: other programs see the bytes, a power loss may still drop them.
  void flush();
  /// flush(), and the bytes survive a power loss.
  void sync();
  /// flush() and close. Nothing may follow.
  void close();

  const Path& path() const { return path_; }
  /// Bytes given to write() so far.
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  void write_through(const char* bytes, size_t size);

  Path path_;
  int file_ = -1;
  std::vector<char> buffer_;
  uint64_t size_bytes_ = 0;
};

/// A file being read from its start. Members throw as throw_file_error does.
class InputFile {
 public:
  explicit InputFile(const Path& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  /// The next bytes, at most `size`; 0 at the end of the file only.
  size_t read(void* bytes, size_t size);

 private:
  Path path_;
  int file_ = -1;
};

/// A file under the system's exclusive lock, which ends with this object or with the process.
class LockFile {
 public:
  enum class State {
    locked,          ///< by us
    held_elsewhere,  ///< by another
    unsupported,     ///< the file system has no locks; nothing is locked
  };

  /// Makes the file if it is missing, and tries to lock it; does not wait.
  explicit LockFile(const Path& path);
  ~LockFile();
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;

  State state() const { return state_; }
  /// Puts `text` in place of the content.
  void replace_text(std::string_view text);

 private:
  Path path_;
  int file_ = -1;
  State state_ = State::unsupported;
};

/// A file seen as memory, read-only. Pages come from disk as they are touched. If another program shortens
/// the file meanwhile, touching what went is a fatal signal, so mapped files are replaced by renaming only.
class MappedFile {
 public:
  /// Throws an input error that names the path if it is missing, a folder or not readable. May be empty.
  static std::shared_ptr<MappedFile> open(const Path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  /// nullptr for an empty file.
  const unsigned char* data() const { return data_; }
  size_t size() const { return size_; }
  const Path& path() const { return path_; }

 private:
  explicit MappedFile(const Path& path) : path_(path) {}

  Path path_;
  unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

/// The whole file. Throws an input error if it is missing, a folder, unreadable or larger than `max_bytes`.
std::string read_text_file(const Path& path, uint64_t max_bytes);

/// Writes a temporary file in the same folder, syncs it, renames it to `path` and syncs the folder: after a
/// crash at any point `path` holds the old bytes or the new ones. On failure the temporary file is removed.
void write_file_atomically(const Path& path, std::string_view bytes);
/// The same for a file that `write` puts out piece by piece.
void write_file_atomically(const Path& path, const std::function<void(OutputFile&)>& write);

bool path_exists(const Path& path);
bool directory_exists(const Path& path);

/// The names in a folder, sorted.
std::vector<std::string> list_directory(const Path& folder);

/// Makes the folder and every missing one above it, each made to survive a power loss.
void make_directories(const Path& folder);

/// Removes a file, or a folder with all in it; links are removed, not followed. A missing path is no error.
void remove_tree(const Path& path);

/// remove_tree for destructors: what cannot be removed stays, nothing is thrown.
void remove_tree_quietly(const Path& path) noexcept;

void rename_path(const Path& from, const Path& to);

/// Two files or folders change places in one step. False where the file system cannot do that.
bool exchange_paths(const Path& first, const Path& second);

/// Makes the entries of one folder survive a power loss.
void sync_directory(const Path& folder);

/// Makes a folder, and all files and folders in it, survive a power loss.
void sync_tree(const Path& folder);

/// "0 bytes", "1.5 KiB", "2.0 GiB".
std::string bytes_text(uint64_t bytes);

}  // namespace headwater
