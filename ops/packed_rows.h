// Rows of numbers read and written four side by side where sizes and addresses allow, else one by one: the same kernel
// with N = 4 or N = 1. Four are 16 bytes of f32 or 8 of bf16: a warp's access fills whole lines either way.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/cuda/device.h"

namespace headwater {

inline constexpr int packed_size = 4;

/// Whether rows of `width` elements can be packed; `tensors` are where they begin, null for an absent one.
inline bool can_pack(int64_t width, std::initializer_list<const void*> tensors) {
  bool possible = width % packed_size == 0;
  for (const void* first : tensors) possible = possible && reinterpret_cast<uintptr_t>(first) % 16 == 0;
  return possible;
}

/// Calls `body` with std::integral_constant N, 4 or 1.
template <class Body>
void dispatch_packing(bool packed, Body&& body) {
  if (packed) {
    body(std::integral_constant<int, packed_size>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

/// n elements as floats; n is 1, or a multiple of 4 with `from` a multiple of 4 elements.
template <int n, class T>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[n]) {
  constexpr int width = n % packed_size == 0 ? packed_size : 1;
#pragma unroll
  for (int i = 0; i < n; i += width) {
    const Packed<T, width> packed = load_packed<width>(from + i);
#pragma unroll
    for (int k = 0; k < width; ++k) values[i + k] = to_float(packed.values[k]);
  }
}

template <int n, class T>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[n]) {
  constexpr int width = n % packed_size == 0 ? packed_size : 1;
#pragma unroll
  for (int i = 0; i < n; i += width) {
    Packed<T, width> packed;
#pragma unroll
    for (int k = 0; k < width; ++k) packed.values[k] = from_float<T>(values[i + k]);
    store_packed<width>(to + i, packed);
  }
}

/// sums[index + i] += values[i]; index is a multiple of N.
template <int N>
__device__ __forceinline__ void add_to_shared(const SharedArray<float>& sums, int index,
                                              const float (&values)[N]) {
  Packed<float, N> sum = sums.load<N>(index);
  for (int i = 0; i < N; ++i) sum.values[i] += values[i];
  sums.store(index, sum);
}

}  // namespace headwater
