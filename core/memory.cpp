#include "core/memory.h"

#include <malloc.h>
#include <sys/mman.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "core/error.h"
#include "core/kernel.h"

namespace headwater {
namespace {

constexpr int64_t alignment = 64;
constexpr int64_t huge_page = int64_t{1} << 21;
// Block sizes are 8 steps to each power of two: at most 1/8 of a block is unused, and the few hundred classes
// make a free block of the right size a matter of one look-up.
constexpr int steps_per_power = 8;
constexpr int n_classes = 48 * steps_per_power;

int size_class_of(int64_t size_bytes) {
  const auto units = static_cast<uint64_t>((std::max<int64_t>(size_bytes, 1) + alignment - 1) / alignment);
  if (units <= steps_per_power) return static_cast<int>(units) - 1;
  const int power = std::bit_width(units - 1) - 1;   // 2^power <= units - 1
  const uint64_t step = (units - 1) >> (power - 3);  // 8..15
  return (power - 3) * steps_per_power + static_cast<int>(step);
}

int64_t class_size_bytes(int size_class) {
  if (size_class < steps_per_power) return (size_class + 1) * alignment;
  const int power = (size_class - steps_per_power) / steps_per_power;
  const int64_t step = size_class - power * steps_per_power;  // 8..15
  return ((step + 1) << power) * alignment;
}

struct Cache {
  std::mutex mutex;
  std::array<std::vector<void*>, n_classes> free_blocks;
  MemoryStatistics statistics;

  void release_all() {
    for (int size_class = 0; size_class < n_classes; ++size_class) {
      for (void* block : free_blocks[size_class]) {
        std::free(block);
        statistics.bytes_reserved -= class_size_bytes(size_class);
      }
      free_blocks[size_class].clear();
    }
  }
};

// Never destroyed: tensors in static storage may be released after any destructor of ours would have run.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

void* allocate_from_system(int64_t size_bytes) {
  void* block = std::aligned_alloc(
      size_bytes >= huge_page ? huge_page : alignment,
      size_bytes >= huge_page ? (size_bytes + huge_page - 1) / huge_page * huge_page : size_bytes);
  // Fewer page faults and TLB misses on the large activations; a refusal costs nothing.
  if (block != nullptr && size_bytes >= huge_page) madvise(block, size_bytes, MADV_HUGEPAGE);
  return block;
}

}  // namespace

Storage::~Storage() {
  give_up();
}

void Storage::give_up() {
  if (owner_ || data_ == nullptr) return;
  Cache& c = cache();
  const std::lock_guard lock(c.mutex);
  c.free_blocks[size_class_].push_back(std::exchange(data_, nullptr));
  c.statistics.bytes_in_use -= class_size_bytes(size_class_);
}

std::shared_ptr<Storage> allocate(int64_t size_bytes, Device device) {
  if (!device.is_cpu()) throw_no_cuda("allocate");
  require(size_bytes >= 0 && size_bytes < (int64_t{1} << 46), "cannot allocate {} bytes", size_bytes);
  const int size_class = size_class_of(size_bytes);
  const int64_t block_bytes = class_size_bytes(size_class);
  Cache& c = cache();
  const std::lock_guard lock(c.mutex);
  MemoryStatistics& statistics = c.statistics;
  void* block = nullptr;
  auto& free_blocks = c.free_blocks[size_class];
  if (!free_blocks.empty()) {
    block = free_blocks.back();
    free_blocks.pop_back();
    ++statistics.cache_hits;
  } else {
    block = allocate_from_system(block_bytes);
    if (block == nullptr) {
      c.release_all();
      block = allocate_from_system(block_bytes);
    }
    if (block == nullptr) {
      throw_machine_error(
          "out of memory: {} bytes asked for, {} bytes in use; use a smaller train.batch or data.length",
          size_bytes, statistics.bytes_in_use);
    }
    ++statistics.system_allocations;
    statistics.bytes_reserved += block_bytes;
  }
  statistics.bytes_in_use += block_bytes;
  statistics.peak_bytes_in_use = std::max(statistics.peak_bytes_in_use, statistics.bytes_in_use);
  return std::make_shared<Storage>(block, size_bytes, size_class, device);
}

void keep_freed_memory() {
#ifdef M_MMAP_THRESHOLD
  constexpr int largest_kept = 1 << 30;
  mallopt(M_MMAP_THRESHOLD, largest_kept);
  mallopt(M_TRIM_THRESHOLD, largest_kept);
#endif
}

MemoryStatistics memory_statistics() {
  const std::lock_guard lock(cache().mutex);
  return cache().statistics;
}

void reset_peak_memory() {
  const std::lock_guard lock(cache().mutex);
  cache().statistics.peak_bytes_in_use = cache().statistics.bytes_in_use;
}

void release_cached_memory() {
  const std::lock_guard lock(cache().mutex);
  cache().release_all();
}

}  // namespace headwater
