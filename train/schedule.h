// The learning rate over a run.
#pragma once

#include <cstdint>
#include <string>

#include "core/options.h"

namespace headwater {

struct ScheduleConfig {
  std::string type = "cosine";
  int64_t warmup_steps = 0;
  double final_ratio = 0.1;
  double decay_fraction = 0.2;

  void declare(Options& options);

  /// How many steps the last part of a wsd run has, in which the learning rate falls.
  int64_t decay_steps(int64_t total_steps) const;
};

/// The learning rate of step s = 0, 1, ..., T - 1, with W warm-up steps and final = final_ratio * peak:
///
///   s < W       peak * (s + 1) / W                                     every type
///   constant    peak
///   linear      final + (peak - final) * (1 - p)                       p = (s - W) / (T - W)
///   cosine      final + (peak - final) * (1 + cos(pi * p)) / 2
///   wsd         peak while s < T - D, then
///               final + (peak - final) * (1 - sqrt(q))                 q = (s - (T - D)) / D,  D =
///               decay_steps(T)
///
/// So the warm-up's first step is not wasted on a rate of 0, its last one has the peak, and `final` is what a
/// step T would have. From there on p and q stay 1. Source: warm-up, linear and cosine as in llm.c; wsd's 1 -
/// sqrt as in Hägele et al. 2024, arXiv:2405.18392.
double learning_rate_at(const ScheduleConfig& schedule, double peak, int64_t step, int64_t total_steps);

}  // namespace headwater
