// core/cuda/device.h for nvcc. Do not include directly.
#pragma once

namespace headwater {

__device__ __forceinline__ void sync_block() {
  __syncthreads();
}
__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}
__device__ __forceinline__ bool any_lane(bool condition) {
  return __any_sync(0xffffffffu, condition) != 0;
}

/// A piece of the block's shared memory.
template <class T>
class SharedArray {
 public:
  __device__ __forceinline__ explicit SharedArray(T* data) : data_(data) {}
  __device__ __forceinline__ T& operator[](int index) const { return data_[index]; }
  /// The same memory from element `offset` on.
  __device__ __forceinline__ SharedArray from(int offset) const { return SharedArray(data_ + offset); }
  template <int N>
  __device__ __forceinline__ Packed<T, N> load(int index) const {
    return *reinterpret_cast<const Packed<T, N>*>(data_ + index);
  }
  template <int N>
  __device__ __forceinline__ void store(int index, const Packed<T, N>& packed) const {
    *reinterpret_cast<Packed<T, N>*>(data_ + index) = packed;
  }
  /// For the primitives of core/cuda only.
  __device__ __forceinline__ T* address(int index) const { return data_ + index; }

 private:
  T* data_;
};

extern __shared__ __align__(128) unsigned char headwater_shared_memory[];

/// Hands out the block's dynamic shared memory, array by array, each at a multiple of 16 bytes. Every thread makes one
/// and asks for the same arrays in the same order; the launch gives the sum of their shared_bytes<T>(size).
class SharedMemory {
 public:
  template <class T>
  __device__ __forceinline__ SharedArray<T> array(int size) {
    T* data = reinterpret_cast<T*>(headwater_shared_memory + used_);
    used_ += (size * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return SharedArray<T>(data);
  }

 private:
  int used_ = 0;
};

/// 16 bytes from `from` (global, aligned) to array[index...] (aligned), in the background.
template <class T>
__device__ __forceinline__ void copy_async(const SharedArray<T>& array, int index, const T* from) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(array.address(index)));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store_packed(T* to, const Packed<T, N>& packed) {
  *reinterpret_cast<Packed<T, N>*>(to) = packed;
}

}  // namespace headwater
