#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "ops/retention_schedule/retention_schedule_kernels.h"

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 16;

void find_positions(const RetentionScheduleArgs& args) {
  const int64_t batch = args.positions.dim(0), length = args.positions.dim(1);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t next = args.first_position.defined() ? args.first_position.data<int64_t>()[b] : 0;
    for (int64_t i = b * length; i < (b + 1) * length; ++i) {
      if (args.resets.defined() && args.resets.data<int32_t>()[i] != 0) next = 0;
      args.positions.data<int64_t>()[i] = next++;
    }
    args.next_position.data<int64_t>()[b] = next;
  }
}

std::vector<double> rotation_rates(int64_t n_pairs) {
  std::vector<double> theta(n_pairs, 1.0);
  for (int64_t j = 1; j < n_pairs; ++j)
    theta[j] = std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(n_pairs - 1));
  return theta;
}

/// Sequences mostly stand at the same positions, and sines are the dear part: row t of a later one is copied from the first
/// where it can be.
template <class T>
void write_rotation(const RetentionScheduleArgs& args) {
  const int64_t length = args.positions.dim(1), n_pairs = args.rotation.dim(2);
  const std::vector<double> theta = rotation_rates(n_pairs);
  const int64_t* positions = args.positions.data<int64_t>();
  T* rotation = args.rotation.data<T>();
  const auto write_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* to = rotation + row * 2 * n_pairs;
      const int64_t first = row % length;
      if (row != first && positions[row] == positions[first]) {
        std::copy_n(rotation + first * 2 * n_pairs, 2 * n_pairs, to);
        continue;
      }
      for (int64_t j = 0; j < n_pairs; ++j) {
        const double angle = static_cast<double>(positions[row]) * theta[j];
        to[2 * j] = static_cast<T>(std::cos(angle));
        to[2 * j + 1] = static_cast<T>(std::sin(angle));
      }
    }
  };
  parallel_for(length, rows_per_task, write_rows);
  parallel_for(args.positions.numel() - length, rows_per_task,
               [&](int64_t begin, int64_t end) { write_rows(length + begin, length + end); });
}

template <class T>
void write_decays(const RetentionScheduleArgs& args) {
  const int64_t n_heads = args.log_decay.numel();
  std::vector<double> log_gamma(n_heads);
  for (int64_t h = 0; h < n_heads; ++h) {
    log_gamma[h] = std::log1p(-std::exp2(-5.0 - static_cast<double>(h)));
    args.log_decay.data<T>()[h] = static_cast<T>(log_gamma[h]);
  }
  parallel_for(args.positions.numel(), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double n_tokens = static_cast<double>(args.positions.data<int64_t>()[row] + 1);
      T* scale = args.row_scale.data<T>() + row * n_heads;
      for (int64_t h = 0; h < n_heads; ++h) {
        scale[h] = static_cast<T>(std::sqrt(std::expm1(log_gamma[h]) / std::expm1(n_tokens * log_gamma[h])));
      }
    }
  });
}

}  // namespace

void retention_schedule_cpu(const RetentionScheduleArgs& args) {
  find_positions(args);
  dispatch_real(args.rotation.dtype(), "retention_schedule", [&](auto element) {
    write_rotation<decltype(element)>(args);
    write_decays<decltype(element)>(args);
  });
}

}  // namespace headwater
