#include "core/random.h"

#include <cmath>
#include <numbers>

#include "core/error.h"

namespace headwater {

uint64_t RandomStream::bits() {
  if (n_unread_words_ == 0) {
    block_ = philox_.block(counter_++);
    n_unread_words_ = 4;
  }
  const size_t next = static_cast<size_t>(4 - n_unread_words_);
  n_unread_words_ -= 2;
  return block_[next] | (uint64_t{block_[next + 1]} << 32);
}

double RandomStream::uniform() {
  return static_cast<double>(bits() >> 11) * 0x1p-53;
}

double RandomStream::uniform(double low, double high) {
  // Rounding may carry the largest draws up to `high` itself; these are drawn again.
  while (true) {
    const double value = low + (high - low) * uniform();
    if (value < high || !(low < high)) return value;
  }
}

double RandomStream::normal() {
  if (has_spare_normal_) {
    has_spare_normal_ = false;
    return spare_normal_;
  }
  const double radius = std::sqrt(-2 * std::log(1 - uniform()));  // 1 - uniform() is never 0
  const double angle = 2 * std::numbers::pi * uniform();
  spare_normal_ = radius * std::sin(angle);
  has_spare_normal_ = true;
  return radius * std::cos(angle);
}

uint64_t RandomStream::below(uint64_t n) {
  require(n > 0, "RandomStream::below(0): there is no number below 0");
  // 2^64 is not a multiple of n: the first 2^64 mod n values are one too many and are drawn again.
  const uint64_t n_surplus = -n % n;
  uint64_t value = bits();
  while (value < n_surplus) value = bits();
  return value % n;
}

}  // namespace headwater
