#include "core/cuda/emulator/device_memory.h"

#include <fmt/core.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace headwater::emulator {
namespace {

constexpr int64_t arena_bytes = int64_t{8} << 30;  // reserved, not used
constexpr int64_t alignment = 256;
constexpr int64_t guard_bytes = 256;
constexpr unsigned char guard_value = 0xa5;
constexpr unsigned char fresh_value = 0xff;

struct Arena;
Arena& arena();
struct sigaction earlier_action;

/// Says what happened in the program's own words; then the fault takes its usual way.
void on_fault(int signal, siginfo_t* info, void*);

struct Arena {
  char* base;
  std::recursive_mutex mutex;
  int n_accesses = 0;
  int64_t in_use = 0;
  int64_t accessible_end = 0;
  std::map<int64_t, int64_t> blocks;  // offset of the data -> size; guards lie before and after

  Arena() {
    void* memory = mmap(nullptr, arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base = static_cast<char*>(memory);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &earlier_action);
  }

  static int64_t rounded(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

  /// The end of what is used last: pages beyond it need no change of protection.
  int64_t used_end() const {
    return blocks.empty() ? 0 : blocks.rbegin()->first + rounded(blocks.rbegin()->second) + guard_bytes;
  }

  void protect(bool accessible) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    // A block that was released since may have been the last one.
    const int64_t end = std::max((used_end() + page - 1) / page * page, accessible ? 0 : accessible_end);
    accessible_end = accessible ? end : 0;
    if (end > 0) mprotect(base, end, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
};

Arena& arena() {
  static Arena* instance = new Arena;
  return *instance;
}

void on_fault(int signal, siginfo_t* info, void*) {
  const char* address = static_cast<const char*>(info->si_addr);
  const Arena& a = arena();
  if (address >= a.base && address < a.base + arena_bytes) {
    constexpr char text[] =
        "headwater: the host touched the emulated GPU's memory outside a kernel; on a GPU this crashes. "
        "Copy the tensor to the cpu first.\n";
    [[maybe_unused]] const auto written = write(STDERR_FILENO, text, sizeof(text) - 1);
  }
  sigaction(signal, &earlier_action, nullptr);
}

void set_guard(char* guard, bool on) {
  if (on) std::memset(guard, guard_value, guard_bytes);
#if defined(__SANITIZE_ADDRESS__)
  if (on) {
    __asan_poison_memory_region(guard, guard_bytes);
  } else {
    __asan_unpoison_memory_region(guard, guard_bytes);
  }
#endif
}

/// Without AddressSanitizer, which sees every access: whether the guard is as it was.
#if defined(__SANITIZE_ADDRESS__)
bool is_intact(const char*, int64_t) {
  return true;
}
#else
bool is_intact(const char* guard, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    if (static_cast<unsigned char>(guard[i]) != guard_value) return false;
  }
  return true;
}
#endif

void check_block(const Arena& a, int64_t offset, int64_t size, const char* kernel) {
  const char* data = a.base + offset;
  const bool before = is_intact(data - guard_bytes, guard_bytes);
  const bool after = is_intact(data + size, a.rounded(size) - size + guard_bytes);
  if (before && after) return;
  throw std::logic_error(fmt::format("kernel {} wrote {} a block of {} bytes of device memory", kernel,
                                     before ? "beyond the end of" : "before the beginning of", size));
}

}  // namespace

void* allocate_device_memory(int64_t size_bytes) {
  Arena& a = arena();
  const std::lock_guard lock(a.mutex);
  const int64_t needed = a.rounded(size_bytes) + 2 * guard_bytes;
  int64_t begin = 0;  // of the gap, guards included
  for (const auto& [offset, size] : a.blocks) {
    if (offset - guard_bytes - begin >= needed) break;
    begin = offset + a.rounded(size) + guard_bytes;
  }
  if (begin + needed > arena_bytes) return nullptr;
  const int64_t offset = begin + guard_bytes;
  a.blocks[offset] = size_bytes;
  a.in_use += size_bytes;
  const DeviceMemoryAccess access;
  char* data = a.base + offset;
  std::memset(data, fresh_value, size_bytes);
  std::memset(data + size_bytes, guard_value, a.rounded(size_bytes) - size_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(data + size_bytes, a.rounded(size_bytes) - size_bytes);
#endif
  set_guard(data - guard_bytes, true);
  set_guard(data + a.rounded(size_bytes), true);
  return data;
}

void release_device_memory(void* data) {
  Arena& a = arena();
  const std::lock_guard lock(a.mutex);
  const int64_t offset = static_cast<char*>(data) - a.base;
  const auto found = a.blocks.find(offset);
  if (found == a.blocks.end()) throw std::logic_error("device memory is released that was not handed out");
  const DeviceMemoryAccess access;
  const int64_t size = found->second;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(a.base + offset, a.rounded(size));
#endif
  set_guard(a.base + offset - guard_bytes, false);
  set_guard(a.base + offset + a.rounded(size), false);
  std::memset(a.base + offset, fresh_value, size);  // a use after release reads NaN
  a.in_use -= size;
  a.blocks.erase(found);
}

int64_t device_memory_in_use() {
  const std::lock_guard lock(arena().mutex);
  return arena().in_use;
}

int64_t device_memory_size() {
  return arena_bytes;
}

void check_device_memory(const char* kernel) {
  Arena& a = arena();
  const std::lock_guard lock(a.mutex);
  const DeviceMemoryAccess access;
  for (const auto& [offset, size] : a.blocks) check_block(a, offset, size, kernel);
}

DeviceMemoryAccess::DeviceMemoryAccess() {
  Arena& a = arena();
  a.mutex.lock();
  if (a.n_accesses++ == 0) {
    a.protect(true);
  }
  a.mutex.unlock();
}

DeviceMemoryAccess::~DeviceMemoryAccess() {
  Arena& a = arena();
  a.mutex.lock();
  if (--a.n_accesses == 0) a.protect(false);
  a.mutex.unlock();
}

}  // namespace headwater::emulator
