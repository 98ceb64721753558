// The caching allocator: blocks are kept and handed out again, so that a training step, once warm,
// asks the system for nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "core/device.h"

namespace headwater {

struct MemoryStatistics {
  int64_t bytes_in_use = 0;        ///< handed out now, rounded up to block sizes
  int64_t peak_bytes_in_use = 0;   ///< the most that was ever handed out since reset_peak_memory
  int64_t bytes_reserved = 0;      ///< taken from the system, in use or cached
  int64_t system_allocations = 0;  ///< how often the system was asked since the program started
  int64_t cache_hits = 0;          ///< how often a cached block served instead
};

/// Memory of a GPU apart from the common cache: for work that is recorded once and run many times (core/cuda/graph.h). The
/// addresses that a recording holds stay its own, from run to run.
class MemoryPool;
std::shared_ptr<MemoryPool> make_memory_pool(Device device);

/// While it lives, this thread allocates on the pool's device from the pool.
class UseMemoryPool {
 public:
  explicit UseMemoryPool(std::shared_ptr<MemoryPool> pool);
  ~UseMemoryPool();
  UseMemoryPool(const UseMemoryPool&) = delete;
  UseMemoryPool& operator=(const UseMemoryPool&) = delete;
};

/// Charges what is allocated on this thread while it lives to `label` ("parameters"), for the text of an out-of-memory
/// error. Without one: "activations and work space". The text must live on.
class MemoryLabel {
 public:
  explicit MemoryLabel(const char* label);
  ~MemoryLabel();
  MemoryLabel(const MemoryLabel&) = delete;
  MemoryLabel& operator=(const MemoryLabel&) = delete;

 private:
  const char* outer_;
};

/// One block of memory on one device; returns itself to the cache, or the pool it came from, when the last tensor on it
/// goes.
/// A block over foreign memory (a mapped file) holds its owner instead and frees nothing.
class Storage {
 public:
  Storage(void* data, int64_t size_bytes, int size_class, Device device, const char* label,
          std::shared_ptr<MemoryPool> pool)
      : data_(data),
        size_bytes_(size_bytes),
        size_class_(size_class),
        device_(device),
        label_(label),
        pool_(std::move(pool)) {}
  Storage(void* data, int64_t size_bytes, std::shared_ptr<const void> owner)
      : data_(data), size_bytes_(size_bytes), owner_(std::move(owner)) {}
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  Device device() const { return device_; }

  /// Returns the block to the cache before the last tensor goes; data() is nullptr from here on.
  void give_up();
  /// Exchanges blocks with `other`, of the same size and device.
  void swap(Storage& other) {
    std::swap(data_, other.data_);
    std::swap(label_, other.label_);
    std::swap(pool_, other.pool_);
  }

 private:
  void* data_;
  int64_t size_bytes_;
  int size_class_ = -1;
  Device device_;
  const char* label_ = nullptr;
  std::shared_ptr<MemoryPool> pool_;  // null: the common cache
  std::shared_ptr<const void> owner_;
};

/// A block of at least `size_bytes`, 64-byte aligned (256 on a GPU), contents undefined. Thread-safe. A GPU's blocks may
/// be handed out again while kernels that use them are still to run: all work is in one stream, so its order holds.
/// Throws a machine error that says what was asked and what is held by what when there is no more, and one that says so
/// when `device` is a GPU and this build has no CUDA.
std::shared_ptr<Storage> allocate(int64_t size_bytes, Device device);

/// Makes the C library keep what it was given back instead of returning it to the system: libraries that allocate their
/// work space in every call (GEMM) would otherwise have its pages cleared anew each time. Call once, first thing.
void keep_freed_memory();

MemoryStatistics memory_statistics(Device device = {});

/// Lets peak_bytes_in_use start again from bytes_in_use.
void reset_peak_memory(Device device = {});

/// Gives every cached block back to the system.
void release_cached_memory();

}  // namespace headwater
