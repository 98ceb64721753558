#include "core/permutation.h"

#include <cmath>
#include <set>
#include <vector>

#include "core/error.h"
#include "tests/catch.h"

namespace headwater {
namespace {

TEST_CASE("Permutation: every value stands at exactly one place") {
  for (const int64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097, 100003}) {
    const Permutation permutation(n, 11, 5);
    std::vector<int> counts(static_cast<size_t>(n), 0);
    for (int64_t place = 0; place < n; ++place) ++counts.at(static_cast<size_t>(permutation.at(place)));
    INFO("n = " << n);
    CHECK(counts == std::vector<int>(static_cast<size_t>(n), 1));
  }
}

TEST_CASE("Permutation: an order never changes, since resumed runs rely on it") {
  std::vector<int64_t> order;
  for (int64_t place = 0; place < 10; ++place) order.push_back(Permutation(10, 1, 2).at(place));
  CHECK(order == std::vector<int64_t>{8, 2, 5, 6, 4, 3, 7, 9, 1, 0});
}

TEST_CASE("Permutation: another seed or stream is another order") {
  const Permutation first(1000, 1, 1);
  const Permutation same(1000, 1, 1);
  const Permutation other_seed(1000, 2, 1);
  const Permutation other_stream(1000, 1, 2);
  int n_equal_seed = 0;
  int n_equal_stream = 0;
  for (int64_t place = 0; place < 1000; ++place) {
    CHECK(first.at(place) == same.at(place));
    n_equal_seed += first.at(place) == other_seed.at(place);
    n_equal_stream += first.at(place) == other_stream.at(place);
  }
  // Unrelated orders agree in one place on average.
  CHECK(n_equal_seed < 10);
  CHECK(n_equal_stream < 10);
}

TEST_CASE("Permutation: of three things, all six orders are about equally frequent") {
  std::vector<int> counts(27, 0);
  const int n_orders = 6000;
  for (int stream = 0; stream < n_orders; ++stream) {
    const Permutation order(3, 1, static_cast<uint64_t>(stream));
    ++counts.at(static_cast<size_t>(order.at(0) * 9 + order.at(1) * 3 + order.at(2)));
  }
  int n_seen = 0;
  for (const int count : counts) {
    if (count == 0) continue;
    ++n_seen;
    CHECK(std::abs(count - n_orders / 6) < 6 * std::sqrt(n_orders / 6.0));
  }
  CHECK(n_seen == 6);
}

TEST_CASE("Permutation: sizes past 2^31 work place by place") {
  const int64_t n = (int64_t{1} << 33) + 7;
  const Permutation permutation(n, 3, 4);
  std::set<int64_t> values;
  for (int64_t place = n - 1000; place < n; ++place) {
    const int64_t value = permutation.at(place);
    CHECK(value >= 0);
    CHECK(value < n);
    values.insert(value);
  }
  CHECK(values.size() == 1000);
  CHECK(Permutation(int64_t{1} << 62, 3, 4).at((int64_t{1} << 62) - 1) >= 0);
}

TEST_CASE("Permutation: rejects sizes and places that make no sense") {
  CHECK_THROWS_WITH(Permutation(0, 1, 1), ContainsSubstring("from 1 to 2^62"));
  CHECK_THROWS_WITH(Permutation(-5, 1, 1), ContainsSubstring("a permutation of -5 things"));
  CHECK_THROWS_WITH(Permutation(3, 1, 1).at(3), ContainsSubstring("place 3 is outside a permutation of 3"));
  CHECK_THROWS_WITH(Permutation(3, 1, 1).at(-1), ContainsSubstring("place -1 is outside"));
}

}  // namespace
}  // namespace headwater
