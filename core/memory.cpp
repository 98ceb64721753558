#include "core/memory.h"

#include <malloc.h>
#include <sys/mman.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/runtime.h"
#include "core/error.h"
#include "core/files.h"

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

const char* const default_label = "activations and work space";
thread_local const char* current_label = default_label;

void* allocate_from_system(int64_t size_bytes) {
  void* block = std::aligned_alloc(
      size_bytes >= huge_page ? huge_page : alignment,
      size_bytes >= huge_page ? (size_bytes + huge_page - 1) / huge_page * huge_page : size_bytes);
  // Fewer page faults and TLB misses on the large activations; a refusal costs nothing.
  if (block != nullptr && size_bytes >= huge_page) madvise(block, size_bytes, MADV_HUGEPAGE);
  return block;
}

using FreeBlocks = std::array<std::vector<void*>, n_classes>;

/// The blocks of one device. The emulated GPU's are not cached: each has exactly the size that was asked for, so that
/// its guards stand where a tensor ends, and new contents, which nothing has written.
struct Cache {
  explicit Cache(Device of) : device(of) {}

  Device device;
  std::mutex mutex;
  FreeBlocks free_blocks;
  MemoryStatistics statistics;
  std::map<std::string, int64_t> bytes_by_label;

  bool keeps_blocks() const { return device.is_cpu() || cuda::backend() == cuda::Backend::hardware; }
  int64_t block_bytes(int64_t size_bytes) const {
    return keeps_blocks() ? class_size_bytes(size_class_of(size_bytes)) : std::max<int64_t>(size_bytes, 1);
  }

  void* take_from_system(int64_t size_bytes) const {
    return device.is_cpu() ? allocate_from_system(size_bytes) : cuda::allocate(size_bytes);
  }
  void give_to_system(void* block, int64_t size_bytes) {
    if (device.is_cpu()) {
      std::free(block);
    } else {
      cuda::release(block, size_bytes);
    }
    statistics.bytes_reserved -= size_bytes;
  }

  void release_all(FreeBlocks& blocks) {
    for (int size_class = 0; size_class < n_classes; ++size_class) {
      for (void* block : blocks[size_class]) give_to_system(block, class_size_bytes(size_class));
      blocks[size_class].clear();
    }
  }

  [[noreturn]] void throw_out_of_memory(int64_t size_bytes) const {
    std::string held;
    for (const auto& [label, bytes] : bytes_by_label) {
      if (bytes > 0) held += fmt::format("{}{} by {}", held.empty() ? "" : ", ", bytes_text(bytes), label);
    }
    throw_machine_error(
        "out of memory on {}: {} asked for by {}, {} in use ({}); use a smaller train.micro_batch or "
        "data.length, or "
        "train.recompute: blocks",
        to_string(device), bytes_text(size_bytes), current_label, bytes_text(statistics.bytes_in_use),
        held.empty() ? "nothing held" : held);
  }
};

// Never destroyed: tensors in static storage may be released after any destructor of ours would have run.
Cache& cache(Device device) {
  static Cache* cpu = new Cache(Device{});
  static Cache* gpu = new Cache(Device{DeviceType::cuda, 0});
  return device.is_cpu() ? *cpu : *gpu;
}

}  // namespace

class MemoryPool {
 public:
  explicit MemoryPool(Device device) : device_(device) {}
  ~MemoryPool() {
    Cache& c = cache(device_);
    const std::lock_guard lock(c.mutex);
    c.release_all(free_blocks);
    for (const auto& [block, size_bytes] : held) c.give_to_system(block, size_bytes);
  }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  Device device() const { return device_; }

  FreeBlocks free_blocks;
  /// Emulated: what was given back, kept so that nobody else gets the addresses.
  std::vector<std::pair<void*, int64_t>> held;

 private:
  Device device_;
};

namespace {
thread_local std::shared_ptr<MemoryPool> current_pool;
}

std::shared_ptr<MemoryPool> make_memory_pool(Device device) {
  return std::make_shared<MemoryPool>(device);
}

UseMemoryPool::UseMemoryPool(std::shared_ptr<MemoryPool> pool) {
  if (current_pool) throw std::logic_error("a memory pool is in use already");
  current_pool = std::move(pool);
}
UseMemoryPool::~UseMemoryPool() {
  current_pool.reset();
}

MemoryLabel::MemoryLabel(const char* label) : outer_(current_label) {
  current_label = label;
}
MemoryLabel::~MemoryLabel() {
  current_label = outer_;
}

Storage::~Storage() {
  give_up();
}

void Storage::give_up() {
  if (owner_ || data_ == nullptr) return;
  Cache& c = cache(device_);
  const std::lock_guard lock(c.mutex);
  const int64_t block_bytes = c.block_bytes(size_bytes_);
  void* data = std::exchange(data_, nullptr);
  if (c.keeps_blocks()) {
    (pool_ ? pool_->free_blocks : c.free_blocks)[size_class_].push_back(data);
  } else if (pool_) {
    pool_->held.emplace_back(data, block_bytes);
  } else {
    c.give_to_system(data, block_bytes);
  }
  c.statistics.bytes_in_use -= block_bytes;
  c.bytes_by_label[label_] -= block_bytes;
}

std::shared_ptr<Storage> allocate(int64_t size_bytes, Device device) {
  require(size_bytes >= 0 && size_bytes < (int64_t{1} << 46), "cannot allocate {} bytes", size_bytes);
  const int size_class = size_class_of(size_bytes);
  Cache& c = cache(device);
  const std::lock_guard lock(c.mutex);
  const int64_t block_bytes = c.block_bytes(size_bytes);
  MemoryStatistics& statistics = c.statistics;
  void* block = nullptr;
  const std::shared_ptr<MemoryPool> pool =
      current_pool && current_pool->device() == device ? current_pool : nullptr;
  auto& free_blocks = (pool ? pool->free_blocks : c.free_blocks)[size_class];
  if (!free_blocks.empty()) {
    block = free_blocks.back();
    free_blocks.pop_back();
    ++statistics.cache_hits;
  } else {
    block = c.take_from_system(block_bytes);
    if (block == nullptr) {
      c.release_all(c.free_blocks);
      block = c.take_from_system(block_bytes);
    }
    if (block == nullptr) c.throw_out_of_memory(size_bytes);
    ++statistics.system_allocations;
    statistics.bytes_reserved += block_bytes;
  }
  statistics.bytes_in_use += block_bytes;
  statistics.peak_bytes_in_use = std::max(statistics.peak_bytes_in_use, statistics.bytes_in_use);
  c.bytes_by_label[current_label] += block_bytes;
  return std::make_shared<Storage>(block, size_bytes, size_class, device, current_label, pool);
}

void keep_freed_memory() {
#ifdef M_MMAP_THRESHOLD
  constexpr int largest_kept = 1 << 30;
  mallopt(M_MMAP_THRESHOLD, largest_kept);
  mallopt(M_TRIM_THRESHOLD, largest_kept);
#endif
}

MemoryStatistics memory_statistics(Device device) {
  Cache& c = cache(device);
  const std::lock_guard lock(c.mutex);
  return c.statistics;
}

void reset_peak_memory(Device device) {
  Cache& c = cache(device);
  const std::lock_guard lock(c.mutex);
  c.statistics.peak_bytes_in_use = c.statistics.bytes_in_use;
}

void release_cached_memory() {
  for (const Device device : {Device{}, Device{DeviceType::cuda, 0}}) {
    Cache& c = cache(device);
    const std::lock_guard lock(c.mutex);
    c.release_all(c.free_blocks);
  }
}

}  // namespace headwater
