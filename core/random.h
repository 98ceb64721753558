// Random numbers that are a pure function of (seed, stream, counter): no hidden state to save, the same
// numbers on any number of threads or ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/bfloat16.h"

namespace headwater {

/// A 64-bit FNV-1a hash of a name: the stream from which the thing of that name draws. Each parameter draws
/// from the stream of its own name, so that its initial values do not depend on the order of construction.
constexpr uint64_t stream_id(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char character : name) {
    hash = (hash ^ static_cast<uint8_t>(character)) * 0x100000001b3u;
  }
  return hash;
}

/// Philox4x32-10, a counter-based generator that passes BigCrush.
///
/// Source  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the philox4x32 of Random123.
/// Layout  The 64-bit key is the seed. Of the 128-bit counter, `counter` is the lower half and `stream` the
///         upper one, so that 2^64 streams of 2^64 blocks never overlap.
/// Kernels draw the same numbers: all of it is for both sides.
class Philox {
 public:
  struct Block {
    uint32_t words[4];
    HEADWATER_HOST_DEVICE constexpr uint32_t operator[](size_t i) const { return words[i]; }
    constexpr bool operator==(const Block&) const = default;
  };

  HEADWATER_HOST_DEVICE constexpr Philox(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  /// Four independent, uniform 32-bit numbers.
  HEADWATER_HOST_DEVICE constexpr Block block(uint64_t counter) const {
    Block words{low(counter), high(counter), low(stream_), high(stream_)};
    uint32_t key0 = low(seed_);
    uint32_t key1 = high(seed_);
    for (int round = 0; round < n_rounds; ++round) {
      const uint64_t product0 = uint64_t{multiplier0} * words[0];
      const uint64_t product1 = uint64_t{multiplier1} * words[2];
      words = {high(product1) ^ words[1] ^ key0, low(product1), high(product0) ^ words[3] ^ key1,
               low(product0)};
      key0 += weyl0;
      key1 += weyl1;
    }
    return words;
  }

 private:
  static constexpr int n_rounds = 10;
  static constexpr uint32_t multiplier0 = 0xd2511f53;
  static constexpr uint32_t multiplier1 = 0xcd9e8d57;
  static constexpr uint32_t weyl0 = 0x9e3779b9;  // golden ratio
  static constexpr uint32_t weyl1 = 0xbb67ae85;  // sqrt(3) - 1

  HEADWATER_HOST_DEVICE static constexpr uint32_t low(uint64_t value) { return static_cast<uint32_t>(value); }
  HEADWATER_HOST_DEVICE static constexpr uint32_t high(uint64_t value) {
    return static_cast<uint32_t>(value >> 32);
  }

  uint64_t seed_;
  uint64_t stream_;
};

/// Reads a Philox stream from its beginning, one number after another.
class RandomStream {
 public:
  RandomStream(uint64_t seed, uint64_t stream) : philox_(seed, stream) {}
  RandomStream(uint64_t seed, std::string_view name) : RandomStream(seed, stream_id(name)) {}

  /// 64 uniform bits.
  uint64_t bits();
  /// Uniform in [0, 1), a multiple of 2^-53.
  double uniform();
  /// Uniform in [low, high).
  double uniform(double low, double high);
  /// Standard normal (Box-Muller).
  double normal();
  /// Uniform in {0, ..., n - 1}, without bias. Throws an input error if n is 0.
  uint64_t below(uint64_t n);

 private:
  Philox philox_;
  uint64_t counter_ = 0;
  Philox::Block block_{};
  int n_unread_words_ = 0;
  double spare_normal_ = 0;
  bool has_spare_normal_ = false;
};

}  // namespace headwater
