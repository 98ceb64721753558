#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace headwater {

namespace {

/// How far `step` is on the way from `begin` to `end`, from 0 to 1.
double progress(int64_t step, int64_t begin, int64_t end) {
  if (step >= end) return 1;
  return static_cast<double>(step - begin) / static_cast<double>(end - begin);
}

/// Which share of the way from the final learning rate up to the peak is left after the warm-up.
double share_left(const ScheduleConfig& schedule, int64_t step, int64_t total_steps) {
  if (schedule.type == "constant") return 1;
  if (schedule.type == "wsd") {
    const int64_t decay_begin = total_steps - schedule.decay_steps(total_steps);
    return step < decay_begin ? 1 : 1 - std::sqrt(progress(step, decay_begin, total_steps));
  }
  const double done = progress(step, schedule.warmup_steps, total_steps);
  return schedule.type == "linear" ? 1 - done : (1 + std::cos(std::numbers::pi * done)) / 2;
}

}  // namespace

void ScheduleConfig::declare(Options& options) {
  options.text("type", &type, "shape of the learning rate after the warm-up; wsd is warm-up, stable, decay")
      .one_of({"constant", "linear", "cosine", "wsd"});
  options.integer("warmup_steps", &warmup_steps, "steps in which the learning rate rises to its peak")
      .at_least(0);
  options.real("final_ratio", &final_ratio, "learning rate at the end of the run / its peak")
      .at_least(0)
      .at_most(1);
  options.used_if(
      "final_ratio", [this] { return type != "constant"; }, "a schedule of type constant ends at its peak");
  options.real("decay_fraction", &decay_fraction, "last part of the run, in which the learning rate falls")
      .above(0)
      .at_most(1);
  options.used_if(
      "decay_fraction", [this] { return type == "wsd"; },
      "only a schedule of type wsd has a decay of its own length");
}

int64_t ScheduleConfig::decay_steps(int64_t total_steps) const {
  return std::llround(decay_fraction * static_cast<double>(total_steps));
}

double learning_rate_at(const ScheduleConfig& schedule, double peak, int64_t step, int64_t total_steps) {
  if (step < schedule.warmup_steps) {
    return peak * static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps);
  }
  const double final_rate = schedule.type == "constant" ? peak : schedule.final_ratio * peak;
  return final_rate + (peak - final_rate) * share_left(schedule, step, total_steps);
}

}  // namespace headwater
