#include "train/schedule.h"

#include <cmath>

#include "tests/catch.h"

using namespace headwater;

namespace {

ScheduleConfig schedule_of(const std::string& type, int64_t warmup_steps) {
  ScheduleConfig schedule;
  schedule.type = type;
  schedule.warmup_steps = warmup_steps;
  schedule.final_ratio = 0.25;
  schedule.decay_fraction = 0.2;
  return schedule;
}

/// Rounding in a handful of operations.
bool nearly_equal(double a, double b) {
  return std::abs(a - b) <= 8 * 2.2e-16 * std::abs(b);
}

}  // namespace

TEST_CASE("learning_rate_at: the warm-up rises to the peak in every type") {
  for (const std::string type : {"constant", "linear", "cosine", "wsd"}) {
    const ScheduleConfig schedule = schedule_of(type, 4);
    CHECK(learning_rate_at(schedule, 2.0, 0, 100) == 0.5);
    CHECK(learning_rate_at(schedule, 2.0, 1, 100) == 1.0);
    CHECK(learning_rate_at(schedule, 2.0, 3, 100) == 2.0);
    CHECK(learning_rate_at(schedule, 2.0, 4, 100) == 2.0);
    CHECK(learning_rate_at(schedule_of(type, 0), 2.0, 0, 100) == 2.0);
  }
}

TEST_CASE("learning_rate_at: every type ends at its final rate and stays there") {
  for (const std::string type : {"linear", "cosine", "wsd"}) {
    CHECK(nearly_equal(learning_rate_at(schedule_of(type, 4), 2.0, 100, 100), 0.5));
    CHECK(nearly_equal(learning_rate_at(schedule_of(type, 4), 2.0, 1000, 100), 0.5));
  }
  CHECK(learning_rate_at(schedule_of("constant", 4), 2.0, 1000, 100) == 2.0);
}

TEST_CASE("learning_rate_at: halfway values follow the formula") {
  CHECK(nearly_equal(learning_rate_at(schedule_of("linear", 20), 2.0, 60, 100), 1.25));
  CHECK(nearly_equal(learning_rate_at(schedule_of("cosine", 20), 2.0, 60, 100), 1.25));
  CHECK(nearly_equal(learning_rate_at(schedule_of("cosine", 0), 2.0, 25, 100),
                     0.5 + 1.5 * (1 + std::sqrt(0.5)) / 2));
}

TEST_CASE("learning_rate_at: wsd is stable, then falls with the root") {
  const ScheduleConfig schedule = schedule_of("wsd", 10);
  CHECK(schedule.decay_steps(100) == 20);
  CHECK(learning_rate_at(schedule, 2.0, 50, 100) == 2.0);
  CHECK(learning_rate_at(schedule, 2.0, 80, 100) == 2.0);
  CHECK(nearly_equal(learning_rate_at(schedule, 2.0, 85, 100), 0.5 + 1.5 * 0.5));
}

TEST_CASE("learning_rate_at: a run that is all warm-up") {
  for (const std::string type : {"linear", "cosine"}) {
    CHECK(learning_rate_at(schedule_of(type, 10), 1.0, 9, 10) == 1.0);
    CHECK(std::isfinite(learning_rate_at(schedule_of(type, 10), 1.0, 10, 10)));
  }
}
