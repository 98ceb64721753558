#include "ops/retention_schedule/retention_schedule.h"

#include <cmath>

#include "tests/catch.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"
#include "tests/threads.h"

using namespace headwater;

namespace {

RetentionScheduleSizes sizes_of(int64_t length, DType dtype = DType::f64, Device device = {}) {
  return {.batch = 3, .length = length, .n_heads = 4, .d_key = 6, .dtype = dtype, .device = device};
}

Tensor first_positions(int64_t a, int64_t b, int64_t c) {
  return Tensor::from_vector<int64_t>({3}, {a, b, c});
}

/// The position of every step, by the definition.
std::vector<int64_t> positions(const Tensor& first, const Tensor& resets, int64_t length) {
  std::vector<int64_t> result;
  for (int64_t b = 0; b < 3; ++b) {
    int64_t n = first.data<int64_t>()[b];
    for (int64_t t = 0; t < length; ++t, ++n) {
      if (resets.defined() && resets.data<int32_t>()[b * length + t] != 0) n = 0;
      result.push_back(n);
    }
  }
  return result;
}

}  // namespace

TEST_CASE("retention_schedule: equals the definition") {
  for (const int64_t length : {1, 31, 32, 33, 70}) {
    const Tensor first = first_positions(0, 5, 0), resets = random_resets(3, length, 0.1);
    const RetentionSchedule schedule = retention_schedule(first, resets, sizes_of(length));
    const std::vector<int64_t> n = positions(first, resets, length);
    const double theta[3] = {1.0, 0.01, 0.0001};
    double worst = 0.0;
    for (int64_t i = 0; i < 3 * length; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        const double angle = static_cast<double>(n[i]) * theta[j];
        const double* pair = schedule.rotation.data<double>() + (i * 3 + j) * 2;
        worst = std::max({worst, std::abs(pair[0] - std::cos(angle)), std::abs(pair[1] - std::sin(angle))});
      }
      for (int64_t h = 0; h < 4; ++h) {
        const double gamma = 1.0 - std::pow(2.0, -5.0 - static_cast<double>(h));
        double sum = 0.0;
        for (int64_t k = 0; k <= n[i]; ++k) sum = gamma * sum + 1.0;
        worst =
            std::max(worst, std::abs(schedule.row_scale.data<double>()[i * 4 + h] * std::sqrt(sum) - 1.0));
        worst = std::max(worst, std::abs(std::exp(schedule.log_decay.data<double>()[h]) - gamma));
      }
    }
    INFO("length " << length);
    // Sums of a few dozen numbers in f64.
    CHECK(worst < 1e-13);
    for (int64_t b = 0; b < 3; ++b)
      CHECK(schedule.next_position.data<int64_t>()[b] == n[(b + 1) * length - 1] + 1);
  }
}

TEST_CASE("retention_schedule: two stretches with the position handed over equal the whole") {
  const Tensor resets = random_resets(3, 40, 0.05);
  const RetentionSchedule whole = retention_schedule({}, resets, sizes_of(40));
  const RetentionSchedule head = retention_schedule({}, steps_of(resets, 0, 13), sizes_of(13));
  const RetentionSchedule tail =
      retention_schedule(head.next_position, steps_of(resets, 13, 40), sizes_of(27));
  CHECK(relative_error(tail.rotation, steps_of(whole.rotation, 13, 40)) == 0.0);
  CHECK(relative_error(tail.row_scale, steps_of(whole.row_scale, 13, 40)) == 0.0);
  CHECK(tail.next_position.to_vector<int64_t>() == whole.next_position.to_vector<int64_t>());
}

TEST_CASE("retention_schedule: f32, on the CPU and on a GPU, agrees with f64, at any position") {
  for (const int64_t first : {int64_t{0}, int64_t{1000000}, int64_t{1} << 36}) {
    for (const int64_t length : {1, 31, 32, 33, 70}) {
      INFO("first position " << first << ", length " << length);
      const Tensor begin = first_positions(first, 0, first + 7), resets = random_resets(3, length, 0.1);
      const RetentionSchedule exact = retention_schedule(begin, resets, sizes_of(length));
      const auto check = [&](const RetentionSchedule& rounded) {
        // The products of a position and an angle round in f64, a few times, by 2^36 * 2^-53 of a radian at worst.
        CHECK(relative_error(rounded.rotation, exact.rotation) < (first > 1000000 ? 5e-5 : 3e-7));
        CHECK(relative_error(rounded.row_scale, exact.row_scale) < 3e-7);
        CHECK(relative_error(rounded.log_decay, exact.log_decay) < 1e-7);
        CHECK(rounded.next_position.to_vector<int64_t>() == exact.next_position.to_vector<int64_t>());
      };
      check(retention_schedule(begin, resets, sizes_of(length, DType::f32)));
      if (!has_cuda()) continue;
      const Device gpu = parse_device("cuda");
      check(retention_schedule(begin.to(gpu), resets.to(gpu), sizes_of(length, DType::f32, gpu)));
    }
  }
}

TEST_CASE("retention_schedule: many heads keep their decays in f32") {
  RetentionScheduleSizes sizes = sizes_of(3, DType::f32);
  sizes.n_heads = 32;
  const RetentionSchedule schedule = retention_schedule({}, {}, sizes);
  const double expected = -std::pow(2.0, -36.0);
  CHECK(std::abs(schedule.log_decay.to_vector<double>()[31] / expected - 1.0) < 1e-7);
  // Three tokens, none of which has decayed.
  CHECK(std::abs(schedule.row_scale.to_vector<double>()[2 * 32 + 31] * std::sqrt(3.0) - 1.0) < 1e-7);
}

TEST_CASE("retention_schedule: the bits do not depend on the number of threads") {
  const auto rotation = [](int threads) {
    const WithThreads with(threads);
    return retention_schedule(first_positions(0, 3, 0), {}, sizes_of(500, DType::f32)).rotation;
  };
  CHECK(rotation(1).to_vector<float>() == rotation(3).to_vector<float>());
}

TEST_CASE("retention_schedule: names what is wrong") {
  RetentionScheduleSizes sizes = sizes_of(5);
  CHECK_THROWS_WITH(retention_schedule(Tensor::zeros({2}, DType::i64), {}, sizes),
                    "retention_schedule: first_position has shape (2); it must be (batch) = (3)");
  CHECK_THROWS_WITH(retention_schedule(Tensor::zeros({3}, DType::i32), {}, sizes),
                    "retention_schedule: first_position is i32; it must be i64");
  sizes.d_key = 5;
  CHECK_THROWS_WITH(retention_schedule({}, {}, sizes), "retention_schedule: d_key is 5; it must be even");
}
