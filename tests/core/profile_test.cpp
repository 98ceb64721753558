#include "core/profile.h"

#include <chrono>
#include <thread>

#include "core/parallel.h"
#include "tests/catch.h"
#include "tests/threads.h"

namespace headwater {
namespace {

/// Work of a known duration.
void wait_ms(int time_ms) {
  std::this_thread::sleep_for(std::chrono::milliseconds(time_ms));
}

/// What `body` charges on this thread.
template <class Body>
std::map<std::string, ProfileEntry> profile_of(const Body& body) {
  set_profiling(true);
  reset_profile();
  body();
  set_profiling(false);
  return profile_entries();
}

TEST_CASE("profile: a product inside a kernel is charged to the product, not to the kernel") {
  const auto entries = profile_of([] {
    const ProfileScope kernel("kernel");
    wait_ms(5);
    for (int i = 0; i < 3; ++i) {
      const ProfileScope product("product");
      wait_ms(20);
    }
  });
  CHECK(entries.at("product").calls == 3);
  CHECK(entries.at("product").seconds >= 0.060);
  CHECK(entries.at("kernel").seconds >= 0.005);
  CHECK(entries.at("kernel").seconds < 0.060);
}

TEST_CASE(
    "profile: with several threads a product counts as long as the clock ran, not once for each thread") {
  const WithThreads threads(4);
  const auto entries = profile_of([] {
    const ProfileScope kernel("kernel");
    parallel_for(4, 1, [](int64_t, int64_t) {
      const ProfileScope product("product");
      wait_ms(20);
    });
  });
  CHECK(entries.at("product").calls == 1);
  CHECK(entries.at("product").seconds >= 0.020);
}

TEST_CASE("profile: nothing is charged while it is off") {
  profile_of([] {});
  { const ProfileScope scope("kernel"); }
  CHECK(profile_entries().empty());
}

}  // namespace
}  // namespace headwater
