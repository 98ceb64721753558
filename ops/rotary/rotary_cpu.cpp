#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "ops/rotary/rotary_kernels.h"

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 16;

/// All heads of one step: they share their angles.
template <class T>
void rotate_step(const RotaryArgs& args, const std::vector<T>& cosines, const std::vector<T>& sines,
                 const T* x, T* y) {
  const int64_t n_heads = args.x.dim(2), head_dim = args.x.dim(3), n_pairs = args.dim / 2;
  const int64_t pair_step = args.interleaved ? 2 : 1, to_second = args.interleaved ? 1 : n_pairs;
  for (int64_t h = 0; h < n_heads; ++h, x += head_dim, y += head_dim) {
    for (int64_t c = 0; c < n_pairs; ++c) {
      const T first = x[c * pair_step], second = x[c * pair_step + to_second];
      y[c * pair_step] = first * cosines[c] - second * sines[c];
      y[c * pair_step + to_second] = first * sines[c] + second * cosines[c];
    }
    std::copy(x + args.dim, x + head_dim, y + args.dim);
  }
}

template <class T>
void rotate(const RotaryArgs& args) {
  const int64_t width = args.x.dim(2) * args.x.dim(3), n_pairs = args.dim / 2;
  std::vector<double> frequencies(n_pairs);
  for (int64_t c = 0; c < n_pairs; ++c) {
    frequencies[c] = std::pow(args.base, -2.0 * static_cast<double>(c) / static_cast<double>(args.dim));
  }
  parallel_for(args.positions.numel(), rows_per_task, [&](int64_t begin, int64_t end) {
    std::vector<T> cosines(n_pairs), sines(n_pairs);
    for (int64_t row = begin; row < end; ++row) {
      const double position =
          (args.backwards ? -1 : 1) * static_cast<double>(args.positions.data<int32_t>()[row]);
      for (int64_t c = 0; c < n_pairs; ++c) {
        cosines[c] = static_cast<T>(std::cos(position * frequencies[c]));
        sines[c] = static_cast<T>(std::sin(position * frequencies[c]));
      }
      rotate_step(args, cosines, sines, args.x.data<T>() + row * width, args.y.data<T>() + row * width);
    }
  });
}

}  // namespace

void rotary_cpu(const RotaryArgs& args) {
  dispatch_real(args.x.dtype(), "rotary", [&](auto element) { rotate<decltype(element)>(args); });
}

}  // namespace headwater
