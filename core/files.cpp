#include "core/files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace headwater {

int FileSystem::open(const Path& path, int flags, mode_t mode) {
  return ::open(path.c_str(), flags | O_CLOEXEC, mode);
}
ssize_t FileSystem::read(int file, void* bytes, size_t size) {
  return ::read(file, bytes, size);
}
ssize_t FileSystem::write(int file, const void* bytes, size_t size) {
  return ::write(file, bytes, size);
}
int FileSystem::fsync(int file) {
  return ::fsync(file);
}
int FileSystem::close(int file) {
  return ::close(file);
}
int FileSystem::status_of(int file, struct ::stat& status) {
  return ::fstat(file, &status);
}

void* FileSystem::map(int file, size_t size) {
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  return data == MAP_FAILED ? nullptr : data;
}
int FileSystem::unmap(void* data, size_t size) {
  return ::munmap(data, size);
}
int FileSystem::lock(int file) {
  return ::flock(file, LOCK_EX | LOCK_NB);
}

int FileSystem::status(const Path& path, struct ::stat& status, bool follow_links) {
  return follow_links ? ::stat(path.c_str(), &status) : ::lstat(path.c_str(), &status);
}
int FileSystem::rename(const Path& from, const Path& to) {
  return ::rename(from.c_str(), to.c_str());
}
int FileSystem::exchange(const Path& first, const Path& second) {
  return ::renameat2(AT_FDCWD, first.c_str(), AT_FDCWD, second.c_str(), RENAME_EXCHANGE);
}
int FileSystem::unlink(const Path& path) {
  return ::unlink(path.c_str());
}
int FileSystem::make_directory(const Path& path) {
  return ::mkdir(path.c_str(), 0777);
}
int FileSystem::remove_directory(const Path& path) {
  return ::rmdir(path.c_str());
}

int FileSystem::list(const Path& path, std::vector<std::string>& names) {
  DIR* folder = ::opendir(path.c_str());
  if (!folder) return -1;
  names.clear();
  errno = 0;  // readdir tells its end from an error by errno alone
  while (const dirent* entry = ::readdir(folder)) {
    const std::string_view name = entry->d_name;
    if (name != "." && name != "..") names.emplace_back(name);
  }
  const int error_number = errno;
  ::closedir(folder);
  errno = error_number;
  return error_number ? -1 : 0;
}

namespace {

constexpr size_t buffer_size_bytes = 1 << 20;

FileSystem real_file_system;
std::atomic<FileSystem*> current_file_system{&real_file_system};

/// Calls again while a signal interrupts the call.
template <class Call>
auto retry_interrupted(Call&& call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

std::string_view advice_for(int error_number) {
  switch (error_number) {
    case ENOENT:
      return "check the spelling of the path";
    case ENOTDIR:
      return "a part of the path is a file, not a folder";
    case EISDIR:
      return "it is a folder; give a file";
    case EACCES:
    case EPERM:
      return "check its owner and permissions with ls -ld";
    case ENAMETOOLONG:
      return "shorten the path";
    case ELOOP:
      return "its links form a circle";
    case EEXIST:
      return "choose another name or remove it";
    case ENOSPC:
      return "free some space; df -h shows what is left";
    case EDQUOT:
      return "free some space or raise the quota";
    case EROFS:
      return "the file system is mounted read-only; choose another folder";
    case EMFILE:
    case ENFILE:
      return "too many files are open; raise the limit with ulimit -n";
    case EIO:
    case ESTALE:
      return "the disk or its connection failed; see dmesg";
    default:
      return {};
  }
}

bool is_fault_of_path(int error_number) {
  constexpr int faults[] = {ENOENT, ENOTDIR, EISDIR, EACCES, EPERM, ENAMETOOLONG, ELOOP, EEXIST};
  return std::find(std::begin(faults), std::end(faults), error_number) != std::end(faults);
}

int open_file(const Path& path, int flags, std::string_view action) {
  const int file = retry_interrupted([&] { return file_system().open(path, flags, 0666); });
  if (file < 0) throw_file_error(action, path, errno);
  return file;
}

/// A file descriptor that closes itself; for files that are read or synced, where closing cannot lose bytes.
class OpenFile {
 public:
  OpenFile(const Path& path, int flags) : file_(open_file(path, flags, "open")) {}
  ~OpenFile() { file_system().close(file_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int descriptor() const { return file_; }

 private:
  int file_;
};

struct ::stat status_of(int file, const Path& path) {
  struct ::stat status {};
  if (retry_interrupted([&] { return file_system().status_of(file, status); }) < 0) {
    throw_file_error("read the size", path, errno);
  }
  return status;
}

void sync_file(int file, const Path& path, std::string_view detail = {}) {
  // An fsync that failed is not tried again: the kernel may have dropped the pages that it could not write.
  if (retry_interrupted([&] { return file_system().fsync(file); }) < 0) {
    throw_file_error("sync to disk", path, errno, detail);
  }
}

void sync_path(const Path& path, int flags) {
  const OpenFile file(path, flags);
  sync_file(file.descriptor(), path);
}

Path folder_of(const Path& path) {
  return path.has_parent_path() ? path.parent_path() : Path(".");
}

/// False where nothing is there; other failures throw.
bool find_status(const Path& path, struct ::stat& status, bool follow_links) {
  if (retry_interrupted([&] { return file_system().status(path, status, follow_links); }) == 0) return true;
  if (errno == ENOENT || errno == ENOTDIR) return false;
  throw_file_error("look up", path, errno);
}

/// A name in `folder` that no living or dead writer uses. Short, so that it fits wherever `path` itself does.
Path next_temporary_path(const Path& folder) {
  static std::atomic<uint64_t> counter{0};
  return folder / fmt::format(".tmp-{}-{}", counter++, ::getpid());
}

}  // namespace

FileSystem& file_system() {
  return *current_file_system;
}

FileSystemOverride::FileSystemOverride(FileSystem& replacement)
    : previous_(current_file_system.exchange(&replacement)) {}
FileSystemOverride::~FileSystemOverride() {
  current_file_system = previous_;
}

void throw_file_error(std::string_view action, const Path& path, int error_number, std::string_view detail) {
  std::string text =
      fmt::format("{}: cannot {}: {}", path.string(), action, std::generic_category().message(error_number));
  if (!detail.empty()) text += fmt::format(" ({})", detail);
  if (const std::string_view advice = advice_for(error_number); !advice.empty()) {
    text += fmt::format("; {}", advice);
  }
  throw Error(is_fault_of_path(error_number) ? ErrorKind::input : ErrorKind::machine, text);
}

OutputFile::OutputFile(const Path& path, Mode mode) : path_(path) {
  constexpr int flags[] = {O_TRUNC, O_EXCL, O_APPEND};  // by Mode
  file_ = open_file(path, O_WRONLY | O_CREAT | flags[static_cast<int>(mode)], "create");
  buffer_.reserve(buffer_size_bytes);
}

OutputFile::~OutputFile() {
  if (file_ >= 0) file_system().close(file_);
}

void OutputFile::write(const void* bytes, size_t size) {
  size_bytes_ += size;
  if (buffer_.size() + size > buffer_size_bytes) flush();
  if (size >= buffer_size_bytes) return write_through(static_cast<const char*>(bytes), size);
  const char* begin = static_cast<const char*>(bytes);
  buffer_.insert(buffer_.end(), begin, begin + size);
}

void OutputFile::write_through(const char* bytes, size_t size) {
  while (size > 0) {
    const ssize_t n_written = retry_interrupted([&] { return file_system().write(file_, bytes, size); });
    if (n_written < 0) {
      const int error_number = errno;
      buffer_.clear();
      throw_file_error(
          "write", path_, error_number,
          fmt::format("{} more wanted, {} in all so far", bytes_text(size), bytes_text(size_bytes_)));
    }
    bytes += n_written;
    size -= static_cast<size_t>(n_written);
  }
}

void OutputFile::flush() {
  write_through(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void OutputFile::sync() {
  flush();
  sync_file(file_, path_, bytes_text(size_bytes_));
}

void OutputFile::close() {
  flush();
  const int file = std::exchange(file_, -1);
  // Linux closes the descriptor even when the call is interrupted; a second try could close another's file.
  if (file_system().close(file) < 0 && errno != EINTR) {
    throw_file_error("close", path_, errno, bytes_text(size_bytes_));
  }
}

InputFile::InputFile(const Path& path) : path_(path), file_(open_file(path, O_RDONLY, "open")) {}

InputFile::~InputFile() {
  file_system().close(file_);
}

size_t InputFile::read(void* bytes, size_t size) {
  const ssize_t n_read = retry_interrupted([&] { return file_system().read(file_, bytes, size); });
  if (n_read < 0) throw_file_error("read", path_, errno);
  return static_cast<size_t>(n_read);
}

LockFile::LockFile(const Path& path) : path_(path), file_(open_file(path, O_RDWR | O_CREAT, "open")) {
  if (retry_interrupted([&] { return file_system().lock(file_); }) == 0) {
    state_ = State::locked;
    return;
  }
  const int error_number = errno;
  if (error_number == EWOULDBLOCK) {
    state_ = State::held_elsewhere;
  } else if (error_number != ENOSYS && error_number != EOPNOTSUPP && error_number != ENOLCK) {
    file_system().close(file_);
    throw_file_error("lock", path, error_number);
  }
}

LockFile::~LockFile() {
  file_system().close(file_);
}

void LockFile::replace_text(std::string_view text) {
  OutputFile file(path_);
  file.write(text);
  file.close();
}

std::shared_ptr<MappedFile> MappedFile::open(const Path& path) {
  const OpenFile file(path, O_RDONLY);
  const struct ::stat status = status_of(file.descriptor(), path);
  if (S_ISDIR(status.st_mode)) throw_file_error("map", path, EISDIR);
  require(S_ISREG(status.st_mode), "{}: cannot map it: it is a pipe or a device; give a regular file",
          path.string());
  std::shared_ptr<MappedFile> result(new MappedFile(path));
  const size_t size = static_cast<size_t>(status.st_size);
  if (size == 0) return result;
  result->data_ = static_cast<unsigned char*>(file_system().map(file.descriptor(), size));
  if (!result->data_) throw_file_error("map", path, errno, bytes_text(size));
  result->size_ = size;
  return result;
}

MappedFile::~MappedFile() {
  if (data_) file_system().unmap(data_, size_);
}

std::string read_text_file(const Path& path, uint64_t max_bytes) {
  InputFile file(path);
  std::string text;
  std::vector<char> piece(1 << 16);
  while (const size_t n_read = file.read(piece.data(), piece.size())) {
    text.append(piece.data(), n_read);
    require(text.size() <= max_bytes,
            "{}: is larger than {}, the most that is read here; is it the right file?", path.string(),
            bytes_text(max_bytes));
  }
  return text;
}

void write_file_atomically(const Path& path, std::string_view bytes) {
  write_file_atomically(path, [&](OutputFile& file) { file.write(bytes); });
}

void write_file_atomically(const Path& path, const std::function<void(OutputFile&)>& write) {
  const Path folder = folder_of(path);
  Path temporary = next_temporary_path(folder);
  while (path_exists(temporary)) temporary = next_temporary_path(folder);
  try {
    OutputFile file(temporary, OutputFile::Mode::exclusive);
    write(file);
    file.sync();
    file.close();
    rename_path(temporary, path);
  } catch (...) {
    remove_tree_quietly(temporary);
    throw;
  }
  sync_directory(folder);
}

bool path_exists(const Path& path) {
  struct ::stat status {};
  return find_status(path, status, true);
}

bool directory_exists(const Path& path) {
  struct ::stat status {};
  return find_status(path, status, true) && S_ISDIR(status.st_mode);
}

std::vector<std::string> list_directory(const Path& folder) {
  std::vector<std::string> names;
  if (retry_interrupted([&] { return file_system().list(folder, names); }) < 0) {
    throw_file_error("list", folder, errno);
  }
  std::sort(names.begin(), names.end());
  return names;
}

void make_directories(const Path& folder) {
  if (folder.empty() || directory_exists(folder)) return;
  if (!folder.has_filename()) return make_directories(folder.parent_path());  // "a/b/" is "a/b"
  make_directories(folder.parent_path());
  const int result = retry_interrupted([&] { return file_system().make_directory(folder); });
  const int error_number = errno;
  // Another process may have made it meanwhile.
  if (result < 0 && !(error_number == EEXIST && directory_exists(folder)))
    throw_file_error("make the folder", folder, error_number);
  sync_directory(folder_of(folder));
}

void remove_tree(const Path& path) {
  struct ::stat status {};
  if (!find_status(path, status, false)) return;
  const bool is_folder = S_ISDIR(status.st_mode);
  if (is_folder) {
    for (const std::string& name : list_directory(path)) remove_tree(path / name);
  }
  const int result = retry_interrupted(
      [&] { return is_folder ? file_system().remove_directory(path) : file_system().unlink(path); });
  if (result < 0 && errno != ENOENT) throw_file_error("remove", path, errno);
}

void remove_tree_quietly(const Path& path) noexcept {
  try {
    remove_tree(path);
  } catch (...) {
    // The caller is already failing, or leaving; the next start cleans up.
  }
}

void rename_path(const Path& from, const Path& to) {
  if (retry_interrupted([&] { return file_system().rename(from, to); }) < 0) {
    throw_file_error(fmt::format("rename it to {}", to.string()), from, errno);
  }
}

bool exchange_paths(const Path& first, const Path& second) {
  if (retry_interrupted([&] { return file_system().exchange(first, second); }) == 0) return true;
  if (errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP) return false;
  throw_file_error(fmt::format("exchange it with {}", second.string()), first, errno);
}

void sync_directory(const Path& folder) {
  sync_path(folder, O_RDONLY | O_DIRECTORY);
}

void sync_tree(const Path& folder) {
  for (const std::string& name : list_directory(folder)) {
    const Path path = folder / name;
    struct ::stat status {};
    if (!find_status(path, status, false)) continue;
    if (S_ISDIR(status.st_mode)) sync_tree(path);
    if (S_ISREG(status.st_mode)) sync_path(path, O_RDONLY);
  }
  sync_directory(folder);
}

std::string bytes_text(uint64_t bytes) {
  if (bytes < 1024) return fmt::format("{} byte{}", bytes, bytes == 1 ? "" : "s");
  constexpr const char* units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double size = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  for (; size >= 1024 && unit + 1 < std::size(units); ++unit) size /= 1024;
  return fmt::format("{:.1f} {}", size, units[unit]);
}

}  // namespace headwater
