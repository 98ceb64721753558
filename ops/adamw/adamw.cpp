#include "ops/adamw/adamw.h"

#include "core/error.h"
#include "ops/adamw/adamw_kernels.h"

namespace headwater {

void adamw_update(const Tensor& value, const Tensor& gradient, const Tensor& m, const Tensor& v,
                  const AdamWOptions& options) {
  for (const Tensor& other : {gradient, m, v}) {
    require(other.shape() == value.shape() && other.dtype() == value.dtype(),
            "adamw_update: a buffer is {} {}; all must be {} {} like the values", name_of(other.dtype()),
            other.shape(), name_of(value.dtype()), value.shape());
  }
  adamw_kernel(value.device(), {value, gradient, m, v, options});
}

double sum_of_squares(const Tensor& values) {
  double sum = 0.0;
  sum_of_squares_kernel(values.device(), {values, &sum});
  return sum;
}

}  // namespace headwater
