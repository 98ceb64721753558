#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/document_positions/document_positions_kernels.h"

namespace headwater {
namespace {

/// One block of one warp a row: its lanes are 32 steps, whose last reset so far is a running maximum over the lanes.
__global__ void count_steps(const int32_t* resets, const int32_t* n_seen, int32_t* positions,
                            int32_t* next_n_seen, int64_t length) {
  const int64_t b = blockIdx.x;
  if (resets != nullptr) resets += b * length;
  int start = n_seen != nullptr ? -n_seen[b] : 0;  // of the present document, as a step of this piece
  for (int64_t begin = 0; begin < length; begin += warp_size) {
    const int t = static_cast<int>(begin) + lane_index();
    const bool is_start = t < length && resets != nullptr && resets[t] != 0;
    int latest = is_start ? t : start;
    for (int delta = 1; delta < warp_size; delta *= 2) {
      const int before = shuffle_up(latest, delta);
      if (lane_index() >= delta && before > latest) latest = before;
    }
    if (t < length) positions[b * length + t] = t - latest;
    start = shuffle(latest, warp_size - 1);
  }
  if (lane_index() == 0) next_n_seen[b] = static_cast<int>(length) - start;
}

}  // namespace

void document_positions_cuda(const DocumentPositionsArgs& args) {
  launch("document_positions", count_steps, {.grid = {args.positions.dim(0)}, .block = warp_size},
         args.resets.data<int32_t>(), args.n_seen.data<int32_t>(), args.positions.data<int32_t>(),
         args.next_n_seen.data<int32_t>(), args.positions.dim(1));
}

}  // namespace headwater
