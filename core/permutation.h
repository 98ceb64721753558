// A random order of n things that is computed place by place: no table, so n may be billions.
#pragma once

#include <cstdint>

#include "core/random.h"

namespace headwater {

/// A random bijection of {0, ..., n - 1}, a pure function of (n, seed, stream). Constant memory;
/// at() takes about a microsecond and is thread-safe.
///
/// A balanced Feistel network with Philox as its round function permutes {0, ..., 4^k - 1}, the smallest such
/// range that holds n. A result outside goes through again until one falls inside: at most four times on
/// average.
class Permutation {
 public:
  /// Throws an input error unless 1 <= n <= 2^62.
  Permutation(int64_t n, uint64_t seed, uint64_t stream);

  int64_t size() const { return static_cast<int64_t>(n_); }
  /// What stands at `place`, 0 <= place < n. Throws an input error for any other place.
  int64_t at(int64_t place) const;

 private:
  uint64_t encrypt(uint64_t place) const;

  uint64_t n_;
  Philox philox_;
  int half_bits_;
};

}  // namespace headwater
