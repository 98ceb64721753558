#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/partial_sums.h"

namespace headwater {
namespace {

constexpr int block = 128;

/// One thread a column; neighbours read neighbours.
__global__ void sum_partials(const float* partials, int64_t n_blocks, int64_t width, bool accumulate,
                             float* target) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float sum = accumulate ? target[column] : 0.0f;
  for (int64_t i = 0; i < n_blocks; ++i) sum += partials[i * width + column];
  target[column] = sum;
}

}  // namespace

void sum_partials_cuda(const Tensor& partials, const Tensor& target, bool accumulate) {
  if (!target.defined()) return;
  const int64_t width = target.numel();
  launch("sum_partials", sum_partials, {.grid = {blocks_for(width, block)}, .block = block},
         partials.data<float>(), partials.dim(0), width, accumulate, target.data<float>());
}

}  // namespace headwater
