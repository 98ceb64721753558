#include "core/parallel.h"
#include "ops/check.h"
#include "ops/rotate_pairs/rotate_pairs_kernels.h"

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 64;

template <class T>
void rotate(const RotatePairsArgs& args) {
  const int64_t n_heads = args.x.dim(2), d = args.x.dim(3);
  const T direction = args.backwards ? T{-1} : T{1};
  parallel_for(rows_of(args.x.shape()), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = args.x.data<T>() + row * d;
      const T* rotation = args.rotation.data<T>() + row / n_heads * d;
      T* y = args.y.data<T>() + row * d;
      const T s =
          static_cast<T>(args.factor) * (args.row_scale.defined() ? args.row_scale.data<T>()[row] : T{1});
      for (int64_t j = 0; j < d; j += 2) {
        const T cosine = s * rotation[j], sine = s * direction * rotation[j + 1];
        y[j] = x[j] * cosine - x[j + 1] * sine;
        y[j + 1] = x[j + 1] * cosine + x[j] * sine;
      }
    }
  });
}

}  // namespace

void rotate_pairs_cpu(const RotatePairsArgs& args) {
  dispatch_real(args.x.dtype(), "rotate_pairs", [&](auto element) { rotate<decltype(element)>(args); });
}

}  // namespace headwater
