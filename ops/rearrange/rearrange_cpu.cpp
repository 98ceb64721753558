#include <algorithm>

#include "core/matrix_block.h"
#include "core/parallel.h"
#include "ops/rearrange/rearrange_kernels.h"

namespace headwater {
namespace {
constexpr int64_t elements_per_task = 16384;
}

void copy_columns_cpu(const CopyColumnsArgs& args) {
  dispatch_real(args.source.dtype(), "concat_last", [&](auto element) {
    using T = decltype(element);
    const T* source = args.source.data<T>() + args.source_column;
    T* target = args.target.data<T>() + args.target_column;
    parallel_for(
        args.rows, 1 + elements_per_task / std::max<int64_t>(1, args.width), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            std::copy_n(source + row * args.source_width, args.width, target + row * args.target_width);
          }
        });
  });
}

void transpose_last_cpu(const TransposeLastArgs& args) {
  const int64_t m = args.x.dim(-2), n = args.x.dim(-1);
  if (args.x.numel() == 0) return;
  dispatch_real(args.x.dtype(), "transpose_last", [&](auto element) {
    using T = decltype(element);
    parallel_for(args.x.numel() / (m * n), 1 + elements_per_task / (m * n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        transpose_block(m, n, args.x.data<T>() + i * m * n, n, args.y.data<T>() + i * m * n, m);
      }
    });
  });
}

void repeat_leading_cpu(const RepeatLeadingArgs& args) {
  const int64_t size = args.x.numel();
  dispatch_real(args.x.dtype(), "repeat_leading", [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < args.y.dim(0); ++i)
      std::copy_n(args.x.data<T>(), size, args.y.data<T>() + i * size);
  });
}

void sum_leading_cpu(const SumLeadingArgs& args) {
  const int64_t size = args.y.numel();
  dispatch_real(args.x.dtype(), "repeat_leading", [&](auto element) {
    using T = decltype(element);
    sum_blocks(args.x.data<T>(), args.x.dim(0), size, false, args.y.data<T>());
  });
}

}  // namespace headwater
