#include "core/permutation.h"

#include <bit>

#include "core/error.h"

namespace headwater {
namespace {

/// Four are enough for a cipher (Luby and Rackoff 1988); small domains need more to look random.
constexpr uint64_t n_rounds = 8;
constexpr int64_t max_size = int64_t{1} << 62;

}  // namespace

Permutation::Permutation(int64_t n, uint64_t seed, uint64_t stream)
    : n_(static_cast<uint64_t>(n)), philox_(seed, stream) {
  require(n >= 1 && n <= max_size, "a permutation of {} things: the number must be from 1 to 2^62", n);
  half_bits_ = (std::bit_width(n_ - 1) + 1) / 2;
}

int64_t Permutation::at(int64_t place) const {
  require(place >= 0 && place < size(), "place {} is outside a permutation of {}", place, n_);
  uint64_t result = encrypt(static_cast<uint64_t>(place));
  while (result >= n_) result = encrypt(result);
  return static_cast<int64_t>(result);
}

uint64_t Permutation::encrypt(uint64_t place) const {
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t left = place >> half_bits_;
  uint64_t right = place & mask;
  for (uint64_t round = 0; round < n_rounds; ++round) {
    const uint64_t mixed = (left ^ philox_.block((round << 32) | right)[0]) & mask;
    left = right;
    right = mixed;
  }
  return (left << half_bits_) | right;
}

}  // namespace headwater
