#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/partial_sums.h"

namespace headwater {
namespace {

constexpr int block = 256;

/// A block owns 32 columns, a lane each: neighbours read neighbours. Its warps share out the partials, since one thread
/// walking all of them would spend its time waiting. Shared: every thread's sum, which the first warp adds in order.
__global__ void sum_partials(const float* partials, int64_t n_blocks, int64_t width, bool accumulate,
                             float* target) {
  SharedMemory shared;
  const SharedArray<float> sums = shared.array<float>(static_cast<int>(blockDim.x));
  const int64_t column = static_cast<int64_t>(blockIdx.x) * warp_size + lane_index();
  float sum = 0.0f;
  if (column < width) {
    for (int64_t i = warp_index(); i < n_blocks; i += n_warps()) sum += partials[i * width + column];
  }
  sums[static_cast<int>(threadIdx.x)] = sum;
  sync_block();
  if (warp_index() != 0 || column >= width) return;
  float total = accumulate ? target[column] : 0.0f;
  for (int warp = 0; warp < n_warps(); ++warp) total += sums[warp * warp_size + lane_index()];
  target[column] = total;
}

}  // namespace

int warps_that_fit(const char* op, int most, int64_t bytes_per_warp, int64_t channels) {
  const int64_t available = cuda::properties().shared_bytes_per_block;
  require(bytes_per_warp <= available,
          "{}: {} channels are too many for the gradient on this GPU, whose blocks have {} bytes of shared "
          "memory; {} "
          "are needed",
          op, channels, available, bytes_per_warp);
  int n_warps = most;
  while (n_warps > 1 && n_warps * bytes_per_warp > available / 2) n_warps /= 2;
  return n_warps;
}

void sum_partials_cuda(const Tensor& partials, const Tensor& target, bool accumulate) {
  if (!target.defined()) return;
  const int64_t width = target.numel();
  launch("sum_partials", sum_partials,
         {.grid = {blocks_for(width, warp_size)}, .block = block, .shared_bytes = shared_bytes<float>(block)},
         partials.data<float>(), partials.dim(0), width, accumulate, target.data<float>());
}

}  // namespace headwater
