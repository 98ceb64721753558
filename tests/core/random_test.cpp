#include "core/random.h"

#include <cmath>
#include <vector>

#include "core/error.h"
#include "tests/catch.h"

namespace headwater {
namespace {

TEST_CASE("Philox: equals Random123's known answers") {
  const uint64_t ones = ~uint64_t{0};
  CHECK(Philox(0, 0).block(0) == Philox::Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(Philox(ones, ones).block(ones) == Philox::Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  // Counter and key are the digits of pi: 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  CHECK(Philox(0x299f31d0a4093822, 0x0370734413198a2e).block(0x85a308d3243f6a88) ==
        Philox::Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("stream_id: equals FNV-1a's known answers") {
  static_assert(stream_id("") == 0xcbf29ce484222325u);
  static_assert(stream_id("a") == 0xaf63dc4c8601ec8cu);
  static_assert(stream_id("foobar") == 0x85944171f73967e8u);
}

TEST_CASE("RandomStream: a stream is a function of seed and name alone") {
  RandomStream first(7, "layers.0.A_log");
  RandomStream again(7, "layers.0.A_log");
  RandomStream other_name(7, "layers.1.A_log");
  RandomStream other_seed(8, "layers.0.A_log");
  bool names_differ = false;
  bool seeds_differ = false;
  for (int draw = 0; draw < 16; ++draw) {
    const uint64_t value = first.bits();
    CHECK(value == again.bits());
    names_differ |= value != other_name.bits();
    seeds_differ |= value != other_seed.bits();
  }
  CHECK(names_differ);
  CHECK(seeds_differ);
}

TEST_CASE("RandomStream: bits are the blocks' words in order") {
  RandomStream stream(3, 5);
  for (uint64_t counter = 0; counter < 3; ++counter) {
    const Philox::Block block = Philox(3, 5).block(counter);
    CHECK(stream.bits() == (block[0] | (uint64_t{block[1]} << 32)));
    CHECK(stream.bits() == (block[2] | (uint64_t{block[3]} << 32)));
  }
}

TEST_CASE("RandomStream: uniform stays in [0, 1) with the right mean and variance") {
  RandomStream stream(1, "uniform");
  const int n = 100000;
  double sum = 0;
  double sum_of_squares = 0;
  for (int draw = 0; draw < n; ++draw) {
    const double value = stream.uniform();
    REQUIRE(value >= 0);
    REQUIRE(value < 1);
    sum += value;
    sum_of_squares += value * value;
  }
  // Six standard errors: sqrt(1/12/n) for the mean, sqrt(4/45/n) for the mean square.
  CHECK(std::abs(sum / n - 0.5) < 6 * std::sqrt(1.0 / 12 / n));
  CHECK(std::abs(sum_of_squares / n - 1.0 / 3) < 6 * std::sqrt(4.0 / 45 / n));
}

TEST_CASE("RandomStream: uniform(low, high) stays below high, even where rounding would reach it") {
  RandomStream stream(1, "range");
  const double next_to_one = std::nextafter(1.0, 2.0);
  for (int draw = 0; draw < 100; ++draw) {
    const double value = stream.uniform(-3, 5);
    CHECK(value >= -3);
    CHECK(value < 5);
    CHECK(stream.uniform(1.0, next_to_one) == 1.0);
  }
  CHECK(stream.uniform(2, 2) == 2);
}

TEST_CASE("RandomStream: normal has the moments of a standard normal") {
  RandomStream stream(1, "normal");
  const int n = 100000;
  double sum = 0;
  double sum_of_squares = 0;
  double sum_of_fourths = 0;
  for (int draw = 0; draw < n; ++draw) {
    const double value = stream.normal();
    REQUIRE(std::isfinite(value));
    sum += value;
    sum_of_squares += value * value;
    sum_of_fourths += value * value * value * value;
  }
  // Six standard errors; the variances of z, z^2 and z^4 are 1, 2 and 96.
  CHECK(std::abs(sum / n) < 6 * std::sqrt(1.0 / n));
  CHECK(std::abs(sum_of_squares / n - 1) < 6 * std::sqrt(2.0 / n));
  CHECK(std::abs(sum_of_fourths / n - 3) < 6 * std::sqrt(96.0 / n));
}

TEST_CASE("RandomStream: below(n) reaches every value about equally often") {
  RandomStream stream(1, "below");
  const int n_draws = 70000;
  std::vector<int> counts(7);
  for (int draw = 0; draw < n_draws; ++draw) ++counts.at(stream.below(7));
  for (const int count : counts) CHECK(std::abs(count - n_draws / 7) < 6 * std::sqrt(n_draws / 7.0));
  CHECK(stream.below(1) == 0);
  // Just above 2^63 nearly half of all draws must be drawn again.
  const uint64_t large = (uint64_t{1} << 63) + 1;
  for (int draw = 0; draw < 100; ++draw) CHECK(stream.below(large) < large);
  CHECK_THROWS_AS(stream.below(0), Error);
}

}  // namespace
}  // namespace headwater
