// Private to the operator: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"
#include "ops/adamw/adamw.h"

namespace headwater {

struct AdamWArgs {
  Tensor value, gradient, m, v;  // (n); all but gradient are updated
  AdamWOptions options;
};

struct SumOfSquaresArgs {
  Tensor values;
  double* sum;  // on the host, written
};

void adamw_cpu(const AdamWArgs& args);
void sum_of_squares_cpu(const SumOfSquaresArgs& args);

inline constexpr Kernel<AdamWArgs> adamw_kernel{"adamw", adamw_cpu};
inline constexpr Kernel<SumOfSquaresArgs> sum_of_squares_kernel{"sum_of_squares", sum_of_squares_cpu};

}  // namespace headwater
