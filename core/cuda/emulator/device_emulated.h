// core/cuda/device.h for the emulator: the same words as core/cuda/device_hardware.h. Do not include directly.
#pragma once

#include <cmath>
#include <cstring>

#include "core/cuda/emulator/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::headwater::emulator::thread_index())
#define blockIdx (::headwater::emulator::block_index())
#define blockDim (::headwater::emulator::block_dim())
#define gridDim (::headwater::emulator::grid_dim())

namespace headwater {

inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

/// The site of a word: where the kernel calls it. The defaults are evaluated there.
#define HEADWATER_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void sync_block(HEADWATER_SITE) {
  emulator::meet_block({"sync_block", file, line});
}
inline void sync_warp(HEADWATER_SITE) {
  emulator::sync_warp({"sync_warp", file, line});
}

namespace emulator {

/// Each lane gets the value of lane source(lane).
template <class T, class Source>
T exchange(const Site& site, T value, const Source& source) {
  T result{};
  meet_warp(site, &value, &result, [&](const auto& in, const auto& out) {
    for (int lane = 0; lane < 32; ++lane) std::memcpy(out[lane], in[source(lane)], sizeof(T));
  });
  return result;
}

/// Lane and value, so that each lane may name another source.
template <class T>
struct Request {
  T value;
  int lane;
};

}  // namespace emulator

template <class T>
T shuffle(T value, int lane, HEADWATER_SITE) {
  const emulator::Request<T> request{value, lane};
  T result{};
  emulator::meet_warp({"shuffle", file, line}, &request, &result, [](const auto& in, const auto& out) {
    for (int i = 0; i < 32; ++i) {
      const int from = static_cast<const emulator::Request<T>*>(in[i])->lane & 31;
      *static_cast<T*>(out[i]) = static_cast<const emulator::Request<T>*>(in[from])->value;
    }
  });
  return result;
}
template <class T>
T shuffle_xor(T value, int mask, HEADWATER_SITE) {
  return emulator::exchange({"shuffle_xor", file, line}, value, [=](int lane) { return (lane ^ mask) & 31; });
}
template <class T>
T shuffle_up(T value, int delta, HEADWATER_SITE) {
  return emulator::exchange({"shuffle_up", file, line}, value,
                            [=](int lane) { return lane >= delta ? lane - delta : lane; });
}
template <class T>
T shuffle_down(T value, int delta, HEADWATER_SITE) {
  return emulator::exchange({"shuffle_down", file, line}, value,
                            [=](int lane) { return lane + delta < 32 ? lane + delta : lane; });
}
inline bool any_lane(bool condition, HEADWATER_SITE) {
  bool result = false;
  emulator::meet_warp({"any_lane", file, line}, &condition, &result, [](const auto& in, const auto& out) {
    bool any = false;
    for (const void* one : in) any = any || *static_cast<const bool*>(one);
    for (void* one : out) *static_cast<bool*>(one) = any;
  });
  return result;
}

/// Stands for T& into shared memory, and notes every access.
template <class T>
class SharedReference {
 public:
  SharedReference(emulator::SharedPiece* piece, int64_t index) : piece_(piece), index_(index) {}
  operator T() const {
    T value;
    std::memcpy(&value, emulator::read_shared(piece_, index_, 1), sizeof(T));
    return value;
  }
  const SharedReference& operator=(T value) const {
    std::memcpy(emulator::write_shared(piece_, index_, 1), &value, sizeof(T));
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const {
    return *this = static_cast<T>(other);
  }
  const SharedReference& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
  const SharedReference& operator-=(T value) const { return *this = static_cast<T>(*this) - value; }
  const SharedReference& operator*=(T value) const { return *this = static_cast<T>(*this) * value; }

 private:
  emulator::SharedPiece* piece_;
  int64_t index_;
};

template <class T>
class SharedArray {
 public:
  SharedArray(emulator::SharedPiece* piece, int64_t offset) : piece_(piece), offset_(offset) {}
  SharedReference<T> operator[](int index) const { return {piece_, offset_ + index}; }
  SharedArray from(int offset) const { return {piece_, offset_ + offset}; }
  template <int N>
  Packed<T, N> load(int index) const {
    Packed<T, N> packed;
    const void* from = emulator::read_shared(piece_, offset_ + index, N);
    emulator::check_alignment(from, sizeof(packed), "SharedArray::load");
    std::memcpy(&packed, from, sizeof(packed));
    return packed;
  }
  template <int N>
  void store(int index, const Packed<T, N>& packed) const {
    void* to = emulator::write_shared(piece_, offset_ + index, N);
    emulator::check_alignment(to, sizeof(packed), "SharedArray::store");
    std::memcpy(to, &packed, sizeof(packed));
  }
  emulator::SharedPiece* piece() const { return piece_; }
  int64_t offset() const { return offset_; }

 private:
  emulator::SharedPiece* piece_;
  int64_t offset_;
};

class SharedMemory {
 public:
  template <class T>
  SharedArray<T> array(int size) {
    return {emulator::shared_piece(n_pieces_++, size, sizeof(T)), 0};
  }

 private:
  int n_pieces_ = 0;
};

template <class T>
void copy_async(const SharedArray<T>& array, int index, const T* from) {
  emulator::check_alignment(from, 16, "copy_async");
  emulator::copy_async(array.piece(), array.offset() + index, from);
}
inline void commit_copies() {
  emulator::commit_copies();
}
template <int N>
void wait_copies() {
  emulator::wait_copies(N);
}

template <int N, class T>
Packed<T, N> load_packed(const T* from) {
  emulator::check_alignment(from, sizeof(Packed<T, N>), "load_packed");
  Packed<T, N> packed;
  std::memcpy(&packed, from, sizeof(packed));
  return packed;
}
template <int N, class T>
void store_packed(T* to, const Packed<T, N>& packed) {
  emulator::check_alignment(to, sizeof(packed), "store_packed");
  std::memcpy(to, &packed, sizeof(packed));
}

}  // namespace headwater
