// Starting a kernel: the one way that all of them are started, on a GPU and emulated.
#pragma once

#include <cstdint>

#include "core/cuda/runtime.h"
#include "core/error.h"

#if defined(HEADWATER_EMULATED)
#include <tuple>

#include "core/cuda/emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace headwater {

/// How many blocks, of how many threads, with how much dynamic shared memory each.
struct LaunchShape {
  struct Blocks {
    int64_t x = 1, y = 1, z = 1;
  };
  Blocks grid = {};
  int block = 128;  ///< threads, a multiple of 32, at most 1024; kernels see threadIdx.x only
  int64_t shared_bytes = 0;
};

/// What an array of `size` elements takes of the block's shared memory (SharedMemory::array).
template <class T>
constexpr int64_t shared_bytes(int64_t size) {
  return (size * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

/// n / size, rounded up: blocks that cover n items.
constexpr int64_t blocks_for(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

/// Puts `kernel(args...)` into the compute stream. A grid without blocks starts nothing. `name` is what errors, and
/// HEADWATER_SYNC=1 (wait for every kernel and check it), call the kernel. Throws a machine error.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another number of arguments");
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  cuda::check_launch_shape(name, shape.grid.x, shape.grid.y, shape.grid.z, shape.block, shape.shared_bytes);
#if defined(HEADWATER_EMULATED)
  emulator::run_or_record(
      [name, kernel, shape, values = std::tuple<Params...>(static_cast<Params>(args)...)] {
        emulator::run(name, {shape.grid.x, shape.grid.y, shape.grid.z}, shape.block, shape.shared_bytes,
                      [&] { std::apply(kernel, values); });
      });
#else
  const auto start = [&](Params... params) {
    void* pointers[] = {static_cast<void*>(&params)..., nullptr};
    cuda::launch_on_hardware(name, reinterpret_cast<const void*>(kernel), shape.grid.x, shape.grid.y,
                             shape.grid.z, shape.block, shape.shared_bytes, pointers);
  };
  start(static_cast<Params>(args)...);
#endif
}

}  // namespace headwater
