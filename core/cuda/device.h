// What kernels are written with: one small vocabulary, for the GPU and for its emulation on the host.
//
// A .cu file includes this and core/cuda/launch.h, and nothing of CUDA. Under nvcc the words below are thin wrappers of
// what the hardware does; in the `emulated` build (HEADWATER_EMULATED) they are calls into core/cuda/emulator, which
// runs every thread of a block as a fiber. docs/cuda.md explains the rules. The words:
//
//   __global__ __device__ threadIdx blockIdx blockDim gridDim      as in CUDA; blocks are multiples of 32 threads
//   sync_block()                      all threads of the block meet; shared memory written before is visible after
//   sync_warp()                       the same for the 32 lanes of a warp
//   shuffle(v, lane) shuffle_xor(v, mask) shuffle_up(v, delta) shuffle_down(v, delta)    v: 4 or 8 bytes; whole warps
//   any_lane(condition)               whether it holds in any lane
//   SharedMemory / SharedArray<T>     pieces of the block's dynamic shared memory
//   copy_async(array, index, from)    16 bytes from global to shared memory, complete after
//   commit_copies(), wait_copies<N>() all but the N groups committed last have arrived (for the calling thread)
//   load_packed<N>(p), store_packed   N elements at once, aligned to their size together
//   core/cuda/matrix_unit.h           products of 16 x 8 tiles on the matrix units
#pragma once

#include <cstdint>

#include "core/bfloat16.h"

namespace headwater {

inline constexpr int warp_size = 32;

/// N elements that move together: at most 16 bytes, at an address that is a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Packed {
  T values[N];
};

}  // namespace headwater

#if defined(HEADWATER_EMULATED)
#include "core/cuda/emulator/device_emulated.h"
#else
#include "core/cuda/device_hardware.h"
#endif

namespace headwater {

__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % warp_size;
}
__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / warp_size;
}
__device__ inline int n_warps() {
  return static_cast<int>(blockDim.x) / warp_size;
}

/// The sum over the warp's lanes, in every lane, always in the same order.
__device__ inline float warp_sum(float value) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

/// The sum over the block's threads, in every thread, always in the same order. `scratch` holds a float for each warp
/// and may be used again at once.
__device__ inline float block_sum(float value, SharedArray<float> scratch) {
  value = warp_sum(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  float sum = 0.0f;
  for (int warp = 0; warp < n_warps(); ++warp) sum += scratch[warp];
  sync_block();
  return sum;
}

__device__ inline float block_max(float value, SharedArray<float> scratch) {
  value = warp_max(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  float largest = scratch[0];
  for (int warp = 1; warp < n_warps(); ++warp) {
    const float other = scratch[warp];
    largest = other > largest ? other : largest;
  }
  sync_block();
  return largest;
}

// ---- elementary functions in float, accurate to a few units in the last place

/// 1 / (1 + e^-x).
__device__ inline float sigmoid_of(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ inline float silu_of(float x) {
  return x * sigmoid_of(x);
}
/// d silu / dx.
__device__ inline float silu_slope(float x) {
  const float s = sigmoid_of(x);
  return s * (1.0f + x * (1.0f - s));
}
/// log(1 + e^x), as max(x, 0) + log1p(e^-|x|): never overflows.
__device__ inline float softplus_of(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

}  // namespace headwater
