// The emulated GPU's memory: out of the host's reach outside kernels and copies, filled with NaN when handed out,
// with guards around every block.
#pragma once

#include <cstdint>

namespace headwater::emulator {

/// nullptr when there is no room. Memory is all ones at first: NaN as f32 and bf16, -1 as an integer.
void* allocate_device_memory(int64_t size_bytes);
/// Throws std::logic_error if something was written beyond its ends.
void release_device_memory(void* data);
int64_t device_memory_in_use();
int64_t device_memory_size();

/// Throws std::logic_error that names `kernel` if a guard around any block was written to.
void check_device_memory(const char* kernel);

/// While one lives, the host may touch device memory.
class DeviceMemoryAccess {
 public:
  DeviceMemoryAccess();
  ~DeviceMemoryAccess();
  DeviceMemoryAccess(const DeviceMemoryAccess&) = delete;
  DeviceMemoryAccess& operator=(const DeviceMemoryAccess&) = delete;
};

}  // namespace headwater::emulator
