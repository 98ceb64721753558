// Sums along a row, in an order that is fixed and that vector registers can follow.
#pragma once

#include <cstdint>

namespace headwater {

/// term(0) + ... + term(n - 1): 16 running sums, which are then added pairwise. The bits depend on the terms
/// alone.
template <class T, class Term>
T lane_sum(int64_t n, const Term& term) {
  constexpr int lanes = 16;
  T partial[lanes] = {};
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int lane = 0; lane < lanes; ++lane) partial[lane] += term(j + lane);
  }
  T sum = 0;
  for (; j < n; ++j) sum += term(j);
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return sum + partial[0];
}

}  // namespace headwater
